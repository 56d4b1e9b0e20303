"""What would harm training in a folder of images."""
