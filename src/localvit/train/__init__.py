"""Training: what a run is told (config), what that builds (recipe), what it keeps (state), and how it goes (loop)."""
