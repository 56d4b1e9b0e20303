"""State dicts of the published program: its names for the entries, and its position embeddings at another size."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from localvit.models.family import Family
from localvit.models.positions import resample_state

COMPUTED_ENTRIES = ("relative_position_index", "attn_mask")
"""Endings of published entries that the model computes from its sizes. They are not read."""


def published_key(model: nn.Module, key: str) -> str:
    """The published name of entry `key` of the model's state dict; `key` itself for a model of another package."""
    if isinstance(model, Family):
        for pattern, replacement in model.published_keys:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                return renamed
    return key


def to_own_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published state dict under the model's names. Unknown entries keep their names, computed ones are dropped.

    For a model of another package, the state dict is returned as it is.
    """
    if not isinstance(model, Family):
        return dict(state_dict)
    own = {published_key(model, key): key for key in model.state_dict()}
    return {own.get(key, key): value for key, value in state_dict.items() if not key.endswith(COMPUTED_ENTRIES)}


def to_published_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `model` under the published names, with the entries that the published program stores too."""
    computed = model.published_buffers() if isinstance(model, Family) else {}
    return {published_key(model, key): value for key, value in state_dict.items()} | computed


def from_published(
    state_dict: Mapping[str, Any], model: Family, img_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The raw weights of a published checkpoint or state dict under the model's names.

    Args:
        state_dict: the checkpoint, with the weights in its entry `model`, or the weights themselves.
        model: a model of one of the families.
        img_size: height and width that the position embeddings were trained at; by default that of the released files.
            The embeddings are resampled if the model has other grids.
    """
    own = to_own_names(state_dict.get("model", state_dict), model)
    return resample_state(model, own, img_size or model.pretrained_cfg["input_size"][1:])
