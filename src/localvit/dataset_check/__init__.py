"""Checking a folder of images for anything that would harm training."""
