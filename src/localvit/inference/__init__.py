"""A trained model made ready to use: fused, run on batches of images, and its cost counted."""
