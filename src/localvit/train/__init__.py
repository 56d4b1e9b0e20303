"""Training: the config, what it builds, the loop, and what a run leaves in its folder."""
