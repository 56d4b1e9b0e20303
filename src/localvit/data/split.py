"""Splitting a data set without a validation set into training and validation images, class by class."""

import hashlib
import logging
from collections.abc import Sequence

from PIL import Image

from localvit.data.images import DataError, Images

logger = logging.getLogger(__name__)


class ImageSubset(Images):
    """The images at some indices of `images`, with the same classes."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = indices
        self.root = images.root
        self.class_names = images.class_names
        self.labels = [images.labels[index] for index in indices]
        self.fixed_order = images.fixed_order

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.indices[index])

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])


def split_images(images: Images, val_fraction: float, seed: int) -> tuple[Images, Images]:
    """Split images into a training and a validation set, with `val_fraction` of each class in the latter.

    The split depends on the seed, the class names and the image names only, not on the order of the images or on other
    classes. A class with two or more images has at least one in either set. The only image of a class is in the
    training set, and a warning is logged.

    Args:
        images: All images.
        val_fraction: Share of each class in the validation set, between 0 and 1.
        seed: Decides which images are in which set.

    Returns:
        Training images, validation images.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1.
        DataError: No class has two images.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be in (0, 1)")
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(images.labels):
        of_class.setdefault(label, []).append(index)
    chosen: set[int] = set()
    for label, indices in of_class.items():
        class_name = _class_name(images, label)
        shuffled = sorted(indices, key=lambda index: _sort_key(seed, class_name, images.name(index)))
        chosen.update(shuffled[: min(max(round(val_fraction * len(indices)), 1), len(indices) - 1)])
    if not chosen:
        raise DataError(
            f"{images.root or 'the data set'} has no class with two images, so none to evaluate on; add images"
        )
    single = sorted(_class_name(images, label) for label, indices in of_class.items() if len(indices) == 1)
    if single:
        logger.warning(
            f"{len(single)} classes have a single image, which is used for training, so they are not evaluated: "
            f"{', '.join(single[:5])}{', ...' if len(single) > 5 else ''}"
        )
    everything = range(len(images))
    return (
        ImageSubset(images, [index for index in everything if index not in chosen]),
        ImageSubset(images, [index for index in everything if index in chosen]),
    )


def _class_name(images: Images, label: int) -> str:
    return images.class_names[label] if images.class_names else str(label)


def _sort_key(seed: int, class_name: str, name: str) -> bytes:
    """A pseudorandom key; the images with the lowest ones are for validation."""
    # File names need not be valid UTF-8, and cannot contain a zero byte.
    return hashlib.sha256(f"{seed}\0{class_name}\0{name}".encode(errors="surrogateescape")).digest()
