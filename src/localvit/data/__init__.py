"""Pictures with labels: where they come from, how they are prepared, and which class of the model each belongs to."""
