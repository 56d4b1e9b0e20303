"""A model without the neighbors of its depth-wise convolutions, to see what they contribute.

Of each kernel only the center tap is kept, so that no patch reads another one there. Nothing is trained again.
"""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from localvit.locality import LocalityFeedForward
from localvit.ops import FusedConvolutions
from localvit.surgery.adapter import LocalityAdapter
from localvit.utils.wrappers import unwrap

Model = TypeVar("Model", bound=nn.Module)


def local_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the locality modules with a depth-wise convolution that reads neighbors, in the order of the model.

    These are the paper's module, fused or not, and the adapters of `localvit.localize`.
    """
    return tuple(_convolutions(model))


def without_neighbors(model: Model, layers: Iterable[str] | None = None) -> Model:
    """A copy of a model whose depth-wise kernels are zero but for their center.

    Args:
        model: the model, fused or not; it stays as it is.
        layers: names of locality modules (see `local_layers`); by default all.

    Raises:
        ValueError: for a name that is not one of them, and a model without any.
    """
    known = local_layers(model)
    chosen = known if layers is None else tuple(layers)
    if not known:
        raise ValueError(f"{type(model).__name__} has no locality module with a depth-wise convolution")
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{unknown[0]!r} is not a locality module of the model; these are {', '.join(known)}")
    changed = copy.deepcopy(model)
    convolutions = _convolutions(changed)
    with torch.no_grad():
        for name in chosen:
            for convolution in convolutions[name]:
                weight = convolution.weight
                row, column = weight.shape[2] // 2, weight.shape[3] // 2
                center = weight[:, :, row, column].clone()
                weight.zero_()
                weight[:, :, row, column] = center
    return changed


def _convolutions(model: nn.Module) -> dict[str, list[Any]]:
    """The convolutions that read neighbors, of each locality module that has one."""
    found = {}
    for name, module in unwrap(model).named_modules():
        if isinstance(module, LocalityFeedForward):
            parts: Iterable[Any] = module.conv
        elif isinstance(module, FusedConvolutions):
            parts = module
            name = name.removesuffix(".conv")
        elif isinstance(module, LocalityAdapter):
            parts = [module.conv]
        else:
            continue
        spatial = [part for part in parts if getattr(part, "groups", 1) > 1 and max(part.weight.shape[2:]) > 1]
        if spatial:
            found[name] = spatial
    return found
