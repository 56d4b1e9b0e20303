"""Which images of a folder a run kept out of training: recorded in its checkpoints, and found again in the folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localvit.data.images import Images
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
    names = [val_images.name(index) for index in range(len(val_images))] if val_images.root == root else []
    sizes = {name: (root / name).stat().st_size for name in names}
    return {HELD_OUT: {"folder": str(root.resolve()), "bytes": sizes, "trained_on": len(train_images)}}


def find_held_out(images: Images, about: Mapping[str, Any]) -> HeldOut | None:
    """Which of these images a run kept out of training; None if the run did not train on their folder.

    The folder is that of the run if it is at the same place, or contains every held-out image with its size. Runs
    without a record are recognized by the place, and their split is computed again.

    Args:
        images: All images of a folder.
        about: What the checkpoint says about its run.
    """
    if images.root is None:
        return None
    record = about.get(HELD_OUT)
    if not isinstance(record, Mapping) or not isinstance(record.get("bytes"), Mapping):
        return _split_again(images, images.root, about.get("config"))
    indices = [index for index in range(len(images)) if images.name(index) in record["bytes"]]
    if not _is_at(images.root, record.get("folder")) and not _have_sizes(images, indices, record["bytes"]):
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


def _have_sizes(images: Images, indices: list[int], sizes: Mapping[str, Any]) -> bool:
    """Whether the images at `indices` are all of the recorded ones, with the same sizes in bytes."""
    if images.root is None or not sizes or len(indices) != len(sizes):
        return False
    names = [images.name(index) for index in indices]
    return all((images.root / name).stat().st_size == sizes[name] for name in names)
