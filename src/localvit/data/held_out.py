"""Which images of a folder a run kept out of training: recorded in its checkpoints, and found again in the folder."""

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localvit.data.images import Images
from localvit.data.recorded_images import image_keys
from localvit.data.split import ImageSubset, split_images

HELD_OUT = "held_out"
"""Name of the record in what a checkpoint says about its run."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The images of a folder that a run kept out of training."""

    indices: list[int]
    """Those that are still in the folder."""
    num_trained_on: int
    """How many images the run was trained on."""


def describe_held_out(train_images: Images, val_images: Images) -> dict[str, Any]:
    """The record for a checkpoint, under `HELD_OUT`: the folder of the training images, and which of its images are
    not used for training. Empty if they are not files.

    Args:
        train_images: The images that the run trains on.
        val_images: The images that it is evaluated on.
    """
    root = train_images.root
    if root is None:
        return {}
    keys = image_keys(val_images, with_sizes=True).numpy().tobytes() if val_images.root == root else b""
    record = {"folder": str(root.resolve()), "images": b64encode(keys).decode(), "trained_on": len(train_images)}
    return {HELD_OUT: record}


def find_held_out(images: Images, about: Mapping[str, Any]) -> HeldOut | None:
    """Which of these images a run kept out of training; None if the run did not train on their folder.

    The folder is that of the run if it is at the same place, or contains every held-out image, of the same size. Runs
    without a record are recognized by the place, and their split is computed again.

    Args:
        images: All images of a folder.
        about: What the checkpoint says about its run.
    """
    if images.root is None:
        return None
    record = about.get(HELD_OUT)
    if not isinstance(record, Mapping) or (keys := _decoded(record.get("images"))) is None:
        return _split_again(images, images.root, about.get("config"))
    indices = torch.isin(image_keys(images, with_sizes=True), keys).nonzero().flatten().tolist()
    has_all = 0 < len(keys) == len(indices)
    if not has_all and not _is_at(images.root, record.get("folder")):
        return None
    others = len(images) - len(indices)
    trained_on = record.get("trained_on")
    return HeldOut(indices=indices, num_trained_on=min(others, trained_on) if isinstance(trained_on, int) else others)


def _split_again(images: Images, root: Path, config: Any) -> HeldOut | None:
    """The split of a run with these settings, if it trained on this folder."""
    if not isinstance(config, Mapping) or str(config.get("data_set")).upper() != "FOLDER":
        return None
    fraction, seed = config.get("val_fraction"), config.get("seed")
    if not _is_at(root, config.get("data_path")) or not isinstance(fraction, float) or not isinstance(seed, int):
        return None
    train_images, val_images = split_images(images, fraction, seed)
    assert isinstance(val_images, ImageSubset)
    return HeldOut(indices=list(val_images.indices), num_trained_on=len(train_images))


def _is_at(folder: Path, recorded: object) -> bool:
    return isinstance(recorded, str) and folder.resolve() == Path(recorded).resolve()


def _decoded(text: object) -> Tensor | None:
    """The keys of the held-out images; None if the record has none."""
    try:
        data = b64decode(text, validate=True) if isinstance(text, str) else b"damaged"
    except ValueError:
        return None
    return None if len(data) % 8 else torch.from_numpy(np.frombuffer(data, dtype="<i8").astype(np.int64))
