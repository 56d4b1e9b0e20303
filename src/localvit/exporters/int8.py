"""int8: what a file is calibrated with, and the images on which it has to show that it lost little.

Shapes: H and W height and width in pixels.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from localvit.data.classes import match_classes
from localvit.data.folders import PathImages
from localvit.data.images import DataError, Images, ImageSequence, UnreadableImage
from localvit.evaluation.unseen_images import open_unseen_images
from localvit.inference.exported import ExportedModel
from localvit.inference.runner import Runner

CALIBRATION_IMAGES = 300
"""How many images NNCF reads by default; more hardly change the ranges of the activations."""
LARGEST_CHECK = 10_000
"""How many labeled images are evaluated at most: their drop has a standard error of 0.2 points where 4 % of the top
classes change."""
LARGEST_UNLABELED_CHECK = 1000
LEAST_IMAGES = 20
"""One image of fewer is more than the 5 % whose top class may change."""


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Quantization to int8 after training, and what it may cost.

    The file is kept only if it loses at most `max_drop` on held-out images. Without labels, its logits are compared
    with those of the float32 file. Raises ValueError for a `max_drop` that makes no sense.
    """

    calibrate: str | Path
    """Folder of training images; of a folder with train/, those in it. At most 300 are used."""
    data_path: str | Path | None = None
    """Held-out images in a folder per class, as `localvit eval` takes them. At most 10,000 are used."""
    images: str | Path | None = None
    """Held-out images without labels. Without these and `data_path`, other images of `calibrate` are used."""
    max_drop: float = 0.5
    """How many points of Acc@1 (percent) may be lost."""

    def __post_init__(self) -> None:
        if not 0 < self.max_drop <= 100:
            raise ValueError(f"max_drop={self.max_drop:g} must be above 0 and at most 100, in points of Acc@1")

    def check_folders(self) -> None:
        """Raise DataError for a folder that is not there: before the model is traced, which may take minutes."""
        for option, folder in (("--calibrate", self.calibrate), ("--data-path", self.data_path)):
            if folder is not None and not Path(folder).is_dir():
                raise DataError(f"{option} {folder}: no such folder")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Some images of a sequence, prepared exactly as evaluation prepares them."""

    images: ImageSequence
    indices: Sequence[int]
    description: str
    labels: Sequence[int] | None = None
    """The true class of each chosen image, as an index of the model's classes."""

    def batches(self, runner: Runner) -> Iterator[tuple[list[int], Tensor]]:
        """Positions and images (B, 3, H, W) of each batch. Raises UnreadableImage."""
        start = 0
        for read, images_BCHW, failed in runner.load_batches(self.images, self.indices):
            if failed or images_BCHW is None:
                raise UnreadableImage(failed[0][1])
            yield list(range(start, start + len(read))), images_BCHW
            start += len(read)

    def inputs(self, runner: Runner, exported: ExportedModel) -> Iterator[np.ndarray]:
        """The file's input for each image by itself."""
        for _, images_BCHW in self.batches(runner):
            batch = exported.as_input(images_BCHW)
            for index in range(len(batch)):
                yield batch[index : index + 1]


def choose_images(settings: Int8, runner: Runner, exported: ExportedModel) -> tuple[Chosen, Chosen]:
    """The images to calibrate with, and those for the check, which are others.

    Raises DataError if there are too few.
    """
    root = Path(settings.calibrate)
    train = root / "train" if (root / "train").is_dir() else root
    found = PathImages([str(train)])
    order = _shuffled(len(found))
    if settings.data_path is not None:
        check = _labeled(settings, Path(settings.data_path), runner, exported)
    elif settings.images is not None:
        others = PathImages([str(settings.images)])
        check = _unlabeled(others, _shuffled(len(others)), f"images of {settings.images}")
    else:
        half = len(order) // 2
        check = _unlabeled(found, order[max(half, len(order) - LARGEST_UNLABELED_CHECK) :], f"other images of {train}")
        order = order[:half]
    chosen = order[:CALIBRATION_IMAGES]
    if not chosen:
        raise DataError(f"--calibrate {train} has {len(found)} images: give at least 2")
    return Chosen(images=found, indices=chosen, description=f"{len(chosen)} images of {train}"), check


def _labeled(settings: Int8, path: Path, runner: Runner, exported: ExportedModel) -> Chosen:
    images, _ = open_unseen_images("FOLDER", path, exported.metadata.about)
    indices = _shuffled(len(images))[:LARGEST_CHECK]
    if len(indices) * settings.max_drop < 100:
        raise DataError(
            f"{len(indices)} images cannot show a drop of {settings.max_drop:g} points: give at least "
            f"{-(-100 // settings.max_drop):.0f} with --data-path, or a larger --max-drop"
        )
    return Chosen(
        images=images,
        indices=indices,
        description=f"{len(indices):,} held-out images of {path}",
        labels=_labels(images, indices, runner, exported),
    )


def _labels(images: Images, indices: Sequence[int], runner: Runner, exported: ExportedModel) -> list[int]:
    class_of = match_classes(images, runner.class_names, exported.num_classes)
    return [class_of[images.labels[index]] for index in indices]


def _unlabeled(images: ImageSequence, order: Sequence[int], description: str) -> Chosen:
    indices = order[:LARGEST_UNLABELED_CHECK]
    if len(indices) < LEAST_IMAGES:
        raise DataError(
            f"{len(indices)} {description} are too few to check int8: at least {LEAST_IMAGES}, better hundreds"
        )
    return Chosen(images=images, indices=indices, description=f"{len(indices):,} {description}, without labels")


def _shuffled(count: int) -> list[int]:
    """All indices in an order that is the same each time."""
    return random.Random(0).sample(range(count), count)
