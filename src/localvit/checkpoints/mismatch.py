"""Whether weights fit a model, which known model they are of if they do not, and the words for it."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from localvit.models.factory import create_model
from localvit.models.family import Family
from localvit.models.published_names import COMPUTED_ENTRIES, published_key
from localvit.models.registry import registered_models

_MAX_KEYS = 4  # that an error message lists


def num_classes_of(state_dict: Mapping[str, Tensor]) -> int | None:
    """How many classes the head in a state dict has; None if it has no head."""
    heads = [key for key in ("head.weight", "head.fc.weight", "fc.weight") if key in state_dict]
    return state_dict[heads[0]].shape[0] if heads and state_dict[heads[0]].ndim else None


def state_dict_mismatch(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The entries that are not as expected, by what is wrong with them; empty if all of them fit."""
    wrong = {
        "missing": [key for key in expected if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in expected],
        "of another shape": [
            key for key in expected if key in state_dict and state_dict[key].shape != expected[key].shape
        ],
    }
    return {what: keys for what, keys in wrong.items() if keys}


def describe_mismatch(wrong: Mapping[str, Sequence[str]]) -> str:
    """The result of `state_dict_mismatch` as text."""
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:_MAX_KEYS])}{', ...' if len(keys) > _MAX_KEYS else ''})"
        for what, keys in wrong.items()
    ]
    return f"entries {', '.join(parts)}"


def known_model(state_dict: Mapping[str, Tensor]) -> str | None:
    """The model of this package whose published entries a state dict has, if there is one.

    The number of classes and the grids of position embeddings may be others.
    """
    shapes = {
        key: value.shape
        for key, value in state_dict.items()
        if not key.startswith("head") and not key.endswith(COMPUTED_ENTRIES)
    }
    for info in registered_models():
        expected, positions = _published_shapes(info.name)
        if expected.keys() == shapes.keys() and all(
            shapes[key] == shape or (key in positions and shapes[key][2:] == shape[2:])
            for key, shape in expected.items()
        ):
            return info.name
    return None


@functools.cache
def _published_shapes(name: str) -> tuple[dict[str, torch.Size], frozenset[str]]:
    """Shapes of a model's published entries without the head, and which of them are position embeddings."""
    model = create_model(name, device="meta")
    entries = ((published_key(model, key), value.shape) for key, value in model.state_dict().items())
    grids = model.position_grids() if isinstance(model, Family) else {}
    positions = frozenset(published_key(model, key) for key in grids)
    return {key: shape for key, shape in entries if not key.startswith("head")}, positions
