"""The images to evaluate a trained model on: those that it was not trained on, as far as its checkpoint tells."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localvit.data.datasets import open_images
from localvit.data.held_out import find_held_out
from localvit.data.images import DataError, Images
from localvit.data.split import ImageSubset

logger = logging.getLogger(__name__)


def open_unseen_images(
    data_set: str,
    data_path: Path | None,
    about: Mapping[str, Any],
    *,
    inat_category: str = "name",
    include_trained: bool = False,
) -> tuple[Images, int]:
    """Open the validation images of a data set. Of a folder without val/ that the model was trained on, they are the
    images that its run held out.

    Args:
        data_set, data_path, inat_category: As in `localvit.data.datasets.open_images`.
        about: What the model's checkpoint says about its run.
        include_trained: Open the images that the model was trained on as well, and log a warning.

    Returns:
        The images, and how many of them the model was trained on.

    Raises:
        DataError: The images cannot be used, or none of them was held out.
    """
    if data_set.upper() != "FOLDER" or data_path is None or not data_path.is_dir() or (data_path / "val").is_dir():
        return open_images(data_set, data_path, inat_category=inat_category), 0
    images = open_images(data_set, data_path, split="train")
    held_out = find_held_out(images, about)
    if held_out is None:
        return (images if images.root == data_path else open_images(data_set, data_path)), 0
    others = len(images) - len(held_out.indices)
    if include_trained:
        logger.warning(
            f"the model was trained on {held_out.num_trained_on:,} of these {len(images):,} images, so the result does "
            "not show how well it classifies other images"
        )
        return images, held_out.num_trained_on
    if not held_out.indices:
        raise DataError(
            f"{data_path} contains none of the images that were kept out of training; evaluate on other images, or "
            "use --include-trained"
        )
    new = "" if others == held_out.num_trained_on else " or which are new"
    logger.info(
        f"{data_path}: evaluating on the {len(held_out.indices):,} images that were kept out of training; the other "
        f"{others:,}, which the model was trained on{new}, are left out (--include-trained evaluates on all)"
    )
    return ImageSubset(images, held_out.indices), 0
