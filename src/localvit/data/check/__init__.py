"""What would hurt in a folder of pictures, found before training on it."""
