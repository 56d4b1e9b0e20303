"""A data set without a validation set split in two, class by class."""

import hashlib
from collections.abc import Callable, Sequence

from PIL import Image

from localvit.data.pictures import DataError, Pictures


class SomePictures(Pictures):
    """Those of `pictures` at `indices`; classes are numbered and named as before."""

    def __init__(self, pictures: Pictures, indices: Sequence[int]) -> None:
        self.pictures = pictures
        self.indices = indices
        self.root = pictures.root
        self.class_names = pictures.class_names
        self.labels = [pictures.labels[index] for index in indices]
        self.fixed_order = pictures.fixed_order

    def load(self, index: int) -> Image.Image:
        return self.pictures.load(self.indices[index])

    def name(self, index: int) -> str:
        return self.pictures.name(self.indices[index])


def split_pictures(
    pictures: Pictures, val_fraction: float, seed: int, remark: Callable[[str], None] = lambda message: None
) -> tuple[Pictures, Pictures]:
    """The pictures to train on, and `val_fraction` of those of each class to evaluate on.

    A picture's side follows from the seed, its class and its name, whatever order the pictures come in and whatever
    other classes there are. Each class with two pictures or more has at least one on either side; the only picture of
    a class is trained on.

    Raises:
        ValueError: for a fraction outside (0, 1).
        DataError: when no class has two pictures.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be in (0, 1)")
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(pictures.labels):
        of_class.setdefault(label, []).append(index)
    chosen: set[int] = set()
    for label, indices in of_class.items():
        class_name = _class_name(pictures, label)
        drawn = sorted(indices, key=lambda index: _draw(seed, class_name, pictures.name(index)))
        chosen.update(drawn[: min(max(round(val_fraction * len(indices)), 1), len(indices) - 1)])
    if not chosen:
        raise DataError(
            f"{pictures.root or 'the data set'} has no class with two pictures, so none to evaluate on; add some"
        )
    single = sorted(_class_name(pictures, label) for label, indices in of_class.items() if len(indices) == 1)
    if single:
        remark(
            f"{len(single)} classes have one picture each, which is trained on and leaves none to evaluate on: "
            f"{', '.join(single[:5])}{', ...' if len(single) > 5 else ''}"
        )
    everything = range(len(pictures))
    return (
        SomePictures(pictures, [index for index in everything if index not in chosen]),
        SomePictures(pictures, [index for index in everything if index in chosen]),
    )


def _class_name(pictures: Pictures, label: int) -> str:
    return pictures.class_names[label] if pictures.class_names else str(label)


def _draw(seed: int, class_name: str, name: str) -> bytes:
    """A number that is as good as random: lower ones are evaluated on."""
    # Names of files may be no valid text, and none holds a zero byte.
    return hashlib.sha256(f"{seed}\0{class_name}\0{name}".encode(errors="surrogateescape")).digest()
