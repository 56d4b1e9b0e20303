"""ImageNet-ReaL: accuracy on the reassessed labels of ImageNet-1k val (Beyer et al., arXiv 2006.07159)."""

import json
from importlib import resources
from pathlib import PurePosixPath

from localvit.data.images import DataError
from localvit.evaluation.evaluate import Evaluation


def real_accuracy(evaluation: Evaluation) -> tuple[float, float, int]:
    """Percent of images with a reassessed label as the best class, as one of the best five, and how many count.

    An image counts if the reassessment kept any label for it. The labels are the list that timm bundles, looked up by
    the validation image's file name.

    Raises DataError when a file is not named like one of ImageNet's validation images.
    """
    text = resources.files("timm.data").joinpath("_info", "imagenet_real_labels.json").read_text()
    labels_of = {f"ILSVRC2012_val_{number:08d}": set(labels) for number, labels in enumerate(json.loads(text), start=1)}
    hits1 = hits5 = count = 0
    for path, classes in zip(evaluation.paths, evaluation.top_classes_NK.tolist(), strict=True):
        stem = PurePosixPath(path).stem
        if stem not in labels_of:
            raise DataError(
                f"{path}: --real-labels needs ImageNet's own file names, such as ILSVRC2012_val_00000001.JPEG"
            )
        labels = labels_of[stem]
        if labels:
            count += 1
            hits1 += classes[0] in labels
            hits5 += not labels.isdisjoint(classes[:5])
    if not count:
        raise DataError("none of these images has a reassessed label")
    return 100 * hits1 / count, 100 * hits5 / count, count
