"""What a model sees in images, one after another; nothing of an image is kept once its classes are told.

Shapes: B images of a batch, M classes of the model, K the best classes that are asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from localvit.data.classes import imagenet_synsets, imagenet_words
from localvit.data.images import ImageSequence, PreparedImages
from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import InferenceOptions, batches, forward


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The best classes of one image, or why there are none."""

    file: str
    """The image's path, or its place in a data set."""
    classes: tuple[int, ...] = ()
    """Indices of the best classes, best first."""
    probabilities: tuple[float, ...] = ()
    """Their softmax probabilities."""
    error: str | None = None
    """Why the image has no classes: it cannot be read, or the model gave no finite numbers for it."""


def predict(
    model: nn.Module,
    images: ImageSequence,
    preprocessing: Preprocessing,
    options: InferenceOptions,
    *,
    topk: int = 5,
) -> Iterator[Prediction]:
    """The `topk` best classes of each image (all classes, where there are fewer), in the order of the images.

    Works in step with whoever takes the predictions: no more than the batches under way are in memory.

    Args:
        model: in evaluation mode, on `options.device`.

    Raises:
        ValueError: for `topk` below 1.
        RuntimeError: when a worker process dies.
    """
    if topk < 1:
        raise ValueError(f"topk={topk} must be at least 1")
    return _predict(model, PreparedImages(images, preprocessing.transform()), options, topk)


@torch.inference_mode()
def _predict(model: nn.Module, prepared: PreparedImages, options: InferenceOptions, topk: int) -> Iterator[Prediction]:
    for indices, images_BCHW, failed in batches(prepared, range(len(prepared)), options):
        done = {}
        for index, reason in failed:
            file = prepared.images.name(index)
            done[index] = Prediction(file=file, error=reason.removeprefix(f"{file}: "))
        if images_BCHW is not None:
            probabilities_BM = forward(model, images_BCHW, options).cpu().double().softmax(1)
            finite_B = probabilities_BM.isfinite().all(1)
            best_BK, classes_BK = probabilities_BM.topk(min(topk, probabilities_BM.shape[1]), dim=1)
            for index, finite, best, classes in zip(indices, finite_B, best_BK, classes_BK, strict=True):
                file = prepared.images.name(index)
                if finite:
                    done[index] = Prediction(
                        file=file, classes=tuple(classes.tolist()), probabilities=tuple(best.tolist())
                    )
                else:
                    done[index] = Prediction(file=file, error="the model gave numbers for it that are not finite")
        for index in sorted(done):
            yield done[index]


def readable_class_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """A model's class names for a person: words for ImageNet's synsets, numbers where the classes have no names."""
    if class_names is None:
        return [str(index) for index in range(num_classes)]
    return imagenet_words() if list(class_names) == imagenet_synsets() else list(class_names)
