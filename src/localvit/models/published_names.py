"""State dicts of the published program: its names for the entries of a model.

A model's own names and the published ones are told apart by the names themselves: some published names are own names of
other entries (Swin's `layers.1.downsample`), so that a state dict is translated as a whole or not at all.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from localvit.models.family import Family

COMPUTED_ENTRIES = ("relative_position_index", "attn_mask")
"""Endings of published entries that the model computes from its sizes. They are not read."""

RAW, AVERAGED = "raw/", "ema/"
"""What the names of the raw and of the averaged weights begin with in a file of this package."""


def published_key(model: nn.Module, key: str) -> str:
    """The published name of entry `key` of the model's state dict; `key` itself for a model of another package."""
    if _is_family(model):
        for pattern, replacement in model.published_keys:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                return renamed
    return key


def to_own_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict under the model's names, given under these or under the published ones.

    The raw weights of a file of this package are under the model's names after `raw/`. Unknown entries keep their
    names, computed ones are dropped. For a model of another package, the state dict is returned as it is.
    """
    if not _is_family(model):
        return dict(state_dict)
    if any(key.startswith(RAW) for key in state_dict):
        state_dict = {key.removeprefix(RAW): value for key, value in state_dict.items() if not key.startswith(AVERAGED)}
    stored = {key: value for key, value in state_dict.items() if not key.endswith(COMPUTED_ENTRIES)}
    own = {published_key(model, key): key for key in model.state_dict()}
    only_published = own.keys() - set(own.values())
    if only_published.isdisjoint(stored):
        return stored
    return {own.get(key, key): value for key, value in stored.items()}


def to_published_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `model` under the published names, with the entries that the published program stores too."""
    computed = model.published_buffers() if _is_family(model) else {}
    return {published_key(model, key): value for key, value in state_dict.items()} | computed


def _is_family(model: nn.Module) -> "TypeGuard[Family]":
    """Whether the model is one of ours. `Family` itself uses this file."""
    return hasattr(model, "published_keys")
