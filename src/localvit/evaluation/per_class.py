"""What an evaluation says class by class: accuracies, and which class is taken for which.

Shapes: N images, C classes.
"""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from localvit.evaluation.evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class that has images."""

    index: int
    name: str
    images: int
    correct: int
    mean_confidence: float
    """Mean probability of the predicted class over this class's images, 0 to 1; NaN where one is not finite."""
    most_common_wrong: int | None
    """The class most often predicted instead, the lowest index of equals; None where every image is right."""

    @property
    def accuracy(self) -> float:
        """Share of the images predicted right, 0 to 1."""
        return self.correct / self.images


def correct_images(evaluation: Evaluation) -> Tensor:
    """Whether each image's best class is the true one, bool (N,)."""
    return evaluation.top_classes_NK[:, 0] == evaluation.labels_N


def count_mistakes(evaluation: Evaluation) -> Counter[tuple[int, int]]:
    """How often each (true class, wrong prediction) happened."""
    wrong_N = ~correct_images(evaluation)
    true = evaluation.labels_N[wrong_N].tolist()
    return Counter(zip(true, evaluation.top_classes_NK[wrong_N, 0].tolist(), strict=True))


def rank_pairs(mistakes: Counter[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of `count_mistakes`, most frequent first, equals by class index."""
    return sorted(mistakes, key=lambda pair: (-mistakes[pair], pair))


def per_class(evaluation: Evaluation) -> list[ClassRow]:
    """A row for each class that has images, by class index."""
    classes = len(evaluation.class_names)
    labels_N = evaluation.labels_N
    images_C = labels_N.bincount(minlength=classes).tolist()
    correct_C = labels_N[correct_images(evaluation)].bincount(minlength=classes).tolist()
    confidence_C = labels_N.bincount(evaluation.top_probabilities_NK[:, 0].double(), minlength=classes).tolist()
    most_common_wrong: dict[int, int] = {}
    for true, predicted in rank_pairs(count_mistakes(evaluation)):
        most_common_wrong.setdefault(true, predicted)
    return [
        ClassRow(
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
