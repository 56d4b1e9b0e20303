"""The images of a run, recorded by name, so that the run keeps them if its folder changes."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localvit.data.images import DataError, Images
from localvit.data.split import ImageSubset

logger = logging.getLogger(__name__)

Record = Mapping[str, Tensor]
"""The keys of the images of "train" and "val", int64."""


def image_keys(images: Images, *, with_sizes: bool = False) -> Tensor:
    """A 64-bit hash of the class name and the name of each image: int64 of shape (N,).

    `with_sizes` includes the sizes of the files, so that images of another folder with equal names differ.
    """
    names, root = images.class_names, images.root if with_sizes else None
    digests = bytearray()
    for index, label in enumerate(images.labels):
        parts: list[object] = [names[label] if names else label, images.name(index)]
        if root is not None:
            parts.append(_size(root / images.name(index)))
        text = "\0".join(map(str, parts)).encode(errors="surrogateescape")
        digests += hashlib.blake2b(text, digest_size=8).digest()
    return torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # a broken link, for example, which is reported where images are decoded
        return None


def recorded_images(images: Images, record: Tensor) -> Images:
    """Those of `images` that are in the record, in the same order."""
    indices = torch.isin(image_keys(images), record).nonzero().flatten().tolist()
    return images if len(indices) == len(images) else ImageSubset(images, indices)


def check_recorded(train_images: Images, val_images: Images, record: Record, num_added: int, place: str) -> None:
    """Log how the images differ from those of the record.

    Args:
        train_images: the images that are left to train on.
        val_images: the images that are left to evaluate on.
        record: the images of the run.
        num_added: number of images that are not in the record.
        place: the data set, for messages.

    Raises:
        DataError: if no image is left to train on or to evaluate on.
    """
    missing = {}
    for split, images in (("training", train_images), ("validation", val_images)):
        expected = record["train" if split == "training" else "val"]
        missing[split] = len(expected) - len(images)
        if not len(images):
            raise DataError(
                f"{place} has none of the {len(expected):,} {split} images of the run to resume: give the run's "
                "--data-path, or start a new run from its weights with --finetune"
            )
    if not num_added and not any(missing.values()):
        return
    changes = [f"{count:,} of its {split} images are missing" for split, count in missing.items() if count]
    if num_added:
        changes.append(f"{num_added:,} images were added, which this run does not use")
    logger.warning(
        f"{place} has changed since the run started: {', '.join(changes)}. The others remain split into training and "
        "validation as before"
    )
