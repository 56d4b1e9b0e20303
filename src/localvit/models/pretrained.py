"""Weights as timm loads them, with `pretrained=True`: the released file, one of your own, a folder of `save_for_hf`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localvit.models.family import Family
from localvit.models.positions import fills, height_and_width, img_size_of, number_of_patches, resample_state
from localvit.models.published_names import to_own_names
from localvit.utils.weight_files import HEADER, read_header, read_weight_file


def from_published(
    state_dict: Mapping[str, Any], model: Family, img_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The raw weights of a checkpoint or state dict under the model's names, for the model's image size.

    Args:
        state_dict: the checkpoint, with the weights in its entry `model`, or the weights themselves, under the
            published names or the model's.
        model: a model of one of the families.
        img_size: height and width that the position embeddings were trained at. By default what timm knows about the
            weights, or for the model's own names the size of the model if they have that size. The embeddings are
            resampled if the model has other grids.

    Raises:
        ValueError: if the position embeddings do not fill the grid of that size.
    """
    weights = state_dict.get("model", state_dict)
    own = {
        # Positions are resampled in float32, or float64.
        key: value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
        for key, value in to_own_names(weights, model).items()
    }
    if img_size is None:
        img_size = _trained_size(model, own, is_published=not weights.keys() >= own.keys())
    return resample_state(model, own, img_size)


def _trained_size(model: Family, state_dict: Mapping[str, Tensor], *, is_published: bool) -> tuple[int, int]:
    # What timm knows about the model that was saved; before 1.0.31 it knows nothing.
    stated = getattr(model, "pretrained_model_args", {}).get("img_size")
    if stated is not None:
        return height_and_width(stated)
    own = img_size_of(model)
    if own is not None and not is_published and fills(model, number_of_patches(model, state_dict), own):
        return own
    return tuple(model.pretrained_cfg["input_size"][1:])


def read_file(path: str | Path) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """The entries of a file for `pretrained_cfg_overlay={"file": path}`, and the image size that it states.

    Only the header of a file of this package states one. Raises as `read_weight_file` does.
    """
    state_dict = read_weight_file(path)
    header = read_header(path, HEADER) if Path(path).suffix == ".safetensors" else None
    match (header or {}).get("img_size"):
        case [int(height), int(width)]:
            return state_dict, (height, width)
    return state_dict, None
