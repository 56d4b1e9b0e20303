"""A data set without a validation set split in two, class by class."""

import hashlib
import logging
from collections.abc import Sequence

from PIL import Image

from localvit.data.images import DataError, Images

logger = logging.getLogger(__name__)


class SomeImages(Images):
    """Those of `images` at `indices`; classes are numbered and named as before."""

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
    """The images to train on, and `val_fraction` of those of each class to evaluate on.

    An image's side follows from the seed, its class and its name, whatever order the images come in and whatever
    other classes there are. Each class with two images or more has at least one on either side; the only image of
    a class is trained on.

    Raises:
        ValueError: for a fraction outside (0, 1).
        DataError: when no class has two images.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be in (0, 1)")
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(images.labels):
        of_class.setdefault(label, []).append(index)
    chosen: set[int] = set()
    for label, indices in of_class.items():
        class_name = _class_name(images, label)
        drawn = sorted(indices, key=lambda index: _draw(seed, class_name, images.name(index)))
        chosen.update(drawn[: min(max(round(val_fraction * len(indices)), 1), len(indices) - 1)])
    if not chosen:
        raise DataError(
            f"{images.root or 'the data set'} has no class with two images, so none to evaluate on; add some"
        )
    single = sorted(_class_name(images, label) for label, indices in of_class.items() if len(indices) == 1)
    if single:
        logger.warning(
            f"{len(single)} classes have one image each, which is trained on and leaves none to evaluate on: "
            f"{', '.join(single[:5])}{', ...' if len(single) > 5 else ''}"
        )
    everything = range(len(images))
    return (
        SomeImages(images, [index for index in everything if index not in chosen]),
        SomeImages(images, [index for index in everything if index in chosen]),
    )


def _class_name(images: Images, label: int) -> str:
    return images.class_names[label] if images.class_names else str(label)


def _draw(seed: int, class_name: str, name: str) -> bytes:
    """A number that is as good as random: lower ones are evaluated on."""
    # Names of files may be no valid text, and none holds a zero byte.
    return hashlib.sha256(f"{seed}\0{class_name}\0{name}".encode(errors="surrogateescape")).digest()
