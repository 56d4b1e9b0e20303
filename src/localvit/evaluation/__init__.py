"""Evaluate and predict: exact metrics over a data set, and the report on them."""
