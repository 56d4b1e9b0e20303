"""Images and their labels: data sets, class names, preprocessing, splits, the order of training, workers."""
