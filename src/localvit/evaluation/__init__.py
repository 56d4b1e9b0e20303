"""Evaluating and predicting with a trained model: exact metrics over a data set, and the report on them."""
