"""Images and labels: data sets, class names, preprocessing, splits, training batches, worker processes."""
