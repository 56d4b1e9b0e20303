"""Metrics beyond accuracy and loss: accuracy per class, calibration, and the reassessed ImageNet labels.

Shapes: N images, C classes, M bins.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

import torch
from torch import Tensor

from localvit.data.classes import imagenet_synsets
from localvit.data.images import DataError
from localvit.evaluation.evaluate import Evaluation
from localvit.utils.intervals import accuracy_interval


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """The result of one class that has images."""

    index: int
    name: str
    images: int
    correct: int
    mean_confidence: float
    """Mean probability of the predicted class over the images of this class, 0 to 1; NaN if one is not finite."""
    most_common_wrong: int | None
    """The class most often predicted instead (the lowest index if several are equal); None if all are correct."""

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, 0 to 1."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy, in percent."""
        return accuracy_interval(100 * self.accuracy, self.images)


def correct_images(evaluation: Evaluation) -> Tensor:
    """Whether the top class of each image is the true one, bool (N,)."""
    return (evaluation.top_classes_NK[:, 0] == evaluation.labels_N) & evaluation.is_finite_N


def count_mistakes(evaluation: Evaluation) -> Counter[tuple[int, int]]:
    """The number of images for each pair of true class and wrong prediction, without those that have no prediction."""
    wrong_N = ~correct_images(evaluation) & evaluation.is_finite_N
    true = evaluation.labels_N[wrong_N].tolist()
    return Counter(zip(true, evaluation.top_classes_NK[wrong_N, 0].tolist(), strict=True))


def rank_pairs(mistakes: Counter[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of `count_mistakes`, most frequent first, equal ones by class index."""
    return sorted(mistakes, key=lambda pair: (-mistakes[pair], pair))


def per_class(evaluation: Evaluation) -> list[ClassMetrics]:
    """The result of each class that has images, by class index."""
    classes = len(evaluation.class_names)
    labels_N = evaluation.labels_N
    images_C = labels_N.bincount(minlength=classes).tolist()
    correct_C = labels_N[correct_images(evaluation)].bincount(minlength=classes).tolist()
    confidence_C = labels_N.bincount(evaluation.top_probabilities_NK[:, 0].double(), minlength=classes).tolist()
    most_common_wrong: dict[int, int] = {}
    for true, predicted in rank_pairs(count_mistakes(evaluation)):
        most_common_wrong.setdefault(true, predicted)
    return [
        ClassMetrics(
            index=index,
            name=name,
            images=images_C[index],
            correct=correct_C[index],
            mean_confidence=confidence_C[index] / images_C[index],
            most_common_wrong=most_common_wrong.get(index),
        )
        for index, name in enumerate(evaluation.class_names)
        if images_C[index]
    ]


@dataclass(frozen=True)
class Bin:
    """Images whose confidence is above `lower` and at most `upper`. Both means are NaN if there are none."""

    lower: float
    upper: float
    count: int
    confidence: float
    """Mean probability of the predicted class, 0 to 1."""
    accuracy: float
    """Share of correct predictions, 0 to 1."""


def reliability_bins(confidences_N: Tensor, correct_N: Tensor, *, bins: int = 15) -> list[Bin]:
    """The bars of a reliability diagram: images grouped by confidence.

    On Calibration of Modern Neural Networks, arXiv 1706.04599, section 2: the bins of equation 2.

    Args:
        confidences_N: Probability of each image's predicted class, 0 to 1.
        correct_N: Whether that class is the true one, bool.
        bins: Number of bins M of equal width. Each includes its upper edge, the first one also 0.

    Raises:
        ValueError: A confidence is not a probability, or the two lengths differ.
    """
    if confidences_N.shape != correct_N.shape or confidences_N.ndim != 1:
        raise ValueError(
            f"confidences {tuple(confidences_N.shape)} and correct {tuple(correct_N.shape)} must be vectors of equal "
            "length"
        )
    confidences_N = confidences_N.double().contiguous()
    if not ((confidences_N >= 0) & (confidences_N <= 1 + 1e-6)).all():
        raise ValueError("a confidence is not a probability from 0 to 1; remove images with non-finite values first")
    edges = [m / bins for m in range(bins + 1)]
    bin_N = torch.bucketize(confidences_N, torch.tensor(edges[1:-1], dtype=torch.float64))
    counts_M = bin_N.bincount(minlength=bins)
    confidence_M = bin_N.bincount(confidences_N, minlength=bins) / counts_M
    accuracy_M = bin_N.bincount(correct_N.double(), minlength=bins) / counts_M
    columns = edges[:-1], edges[1:], counts_M.tolist(), confidence_M.tolist(), accuracy_M.tolist()
    return [Bin(*values) for values in zip(*columns, strict=True)]


def reliability(evaluation: Evaluation) -> list[Bin]:
    """The reliability diagram of an evaluation's own probabilities, without images whose output is not finite."""
    finite_N = evaluation.is_finite_N
    return reliability_bins(evaluation.top_probabilities_NK[finite_N, 0], correct_images(evaluation)[finite_N])


def expected_calibration_error(bins: list[Bin]) -> float:
    """Mean difference between confidence and accuracy over images, 0 to 1 (equation 3); NaN without images."""
    count = sum(bin.count for bin in bins)
    gaps = [bin.count * abs(bin.accuracy - bin.confidence) for bin in bins if bin.count]
    return sum(gaps) / count if count else float("nan")


def reassessed_labels(names: Sequence[str], class_names: Sequence[str] | None) -> list[set[int]]:
    """The labels of each image in ImageNet-ReaL, the reassessed labels of ImageNet-1k val (arXiv 2006.07159).

    The labels are those bundled with timm, looked up by the file name of the validation image. An image for which the
    reassessment kept no label has none.

    Args:
        names: Paths of the images.
        class_names: Names of the model's classes.

    Raises:
        DataError: A file is not named like an ImageNet validation image, the classes are not those of ImageNet-1k, or
            no image has a label.
    """
    text = resources.files("timm.data").joinpath("_info", "imagenet_real_labels.json").read_text()
    labels_of = {f"ILSVRC2012_val_{number:08d}": set(labels) for number, labels in enumerate(json.loads(text), start=1)}
    stems = [PurePosixPath(name).stem for name in names]
    for name, stem in zip(names, stems, strict=True):
        if stem not in labels_of:
            raise DataError(
                f"{name}: --real-labels needs ImageNet's original file names, such as ILSVRC2012_val_00000001.JPEG"
            )
    if class_names is None or list(class_names) != imagenet_synsets():
        raise DataError("--real-labels needs a model of the 1,000 classes of ImageNet-1k, in their order")
    labels = [labels_of[stem] for stem in stems]
    if not any(labels):
        raise DataError("none of these images has a reassessed label")
    return labels


def real_accuracy(evaluation: Evaluation) -> tuple[float, float, int]:
    """Accuracy on the labels of `reassessed_labels`. An image counts if it has one.

    Returns:
        Top-1 accuracy and top-5 accuracy in percent, and the number of images that count.

    Raises:
        DataError: As `reassessed_labels`.
    """
    hits1 = hits5 = count = 0
    labels_of_images = reassessed_labels(evaluation.paths, evaluation.class_names)
    predictions = evaluation.top_classes_NK.where(evaluation.is_finite_N[:, None], -1).tolist()
    for labels, classes in zip(labels_of_images, predictions, strict=True):
        if labels:
            count += 1
            hits1 += classes[0] in labels
            hits5 += not labels.isdisjoint(classes[:5])
    return 100 * hits1 / count, 100 * hits5 / count, count
