"""Weights in and out, in our layout and the published one: strict, and running no code from a file."""
