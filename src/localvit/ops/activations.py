"""The locality module's two activations by name, for the paths that do not call the layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = ("hs", "relu6")
"""h-swish (arXiv 1905.02244) and ReLU6."""


def activation_name(layer: nn.Module) -> str | None:
    """The name of a layer that computes exactly one of `ACTIVATIONS`, else None."""
    if type(layer) is nn.Hardswish:
        return "hs"
    if type(layer) is nn.ReLU6 and (layer.min_val, layer.max_val) == (0.0, 6.0):
        return "relu6"
    return None


def activate(u: Tensor, act: str, *, inplace: bool = False) -> Tensor:
    """The activation `act`, one of `ACTIVATIONS`, of `u`."""
    return F.hardswish(u, inplace) if act == "hs" else F.relu6(u, inplace)


def activation_backward(grad: Tensor, u: Tensor, act: str) -> Tensor:
    """The gradient with respect to `u`, given that of `activate(u, act)`."""
    if act == "hs":
        return torch.ops.aten.hardswish_backward(grad, u)
    return torch.ops.aten.hardtanh_backward(grad, u, 0.0, 6.0)
