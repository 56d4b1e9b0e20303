"""Whether weights fit a model, whose they are if they do not, and how to say it."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from localvit.models.registry import COMPUTED_ENTRIES, published_key
from localvit.models.zoo import ZOO, create_model

_NAMED = 4  # how many keys an error message names


def classes_of(state_dict: Mapping[str, Tensor]) -> int | None:
    """How many classes the head of a state dict has."""
    heads = [key for key in ("head.weight", "head.fc.weight", "fc.weight") if key in state_dict]
    return state_dict[heads[0]].shape[0] if heads else None


def state_dict_mismatch(state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The entries that are not as wanted, by what is wrong with them; nothing where all fit."""
    wrong = {
        "missing": [key for key in wanted if key not in state_dict],
        "surplus": [key for key in state_dict if key not in wanted],
        "of another shape": [key for key in wanted if key in state_dict and state_dict[key].shape != wanted[key].shape],
    }
    return {what: keys for what, keys in wrong.items() if keys}


def describe_mismatch(wrong: Mapping[str, Sequence[str]]) -> str:
    """What `state_dict_mismatch` found, for a person."""
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''})"
        for what, keys in wrong.items()
    ]
    return f"entries {', '.join(parts)}"


def known_model(state_dict: Mapping[str, Tensor]) -> str | None:
    """The published model whose entries a state dict has, heads aside, if there is one."""
    shapes = {
        key: value.shape
        for key, value in state_dict.items()
        if not key.startswith("head") and not key.endswith(COMPUTED_ENTRIES)
    }
    return next((published.name for published in ZOO if _published_shapes(published.name) == shapes), None)


@functools.cache
def _published_shapes(name: str) -> dict[str, torch.Size]:
    model = create_model(name, device="meta")
    entries = ((published_key(model, key), value.shape) for key, value in model.state_dict().items())
    return {key: shape for key, shape in entries if not key.startswith("head")}
