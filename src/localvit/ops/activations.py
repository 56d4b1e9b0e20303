"""The locality module's two activations by name, for the forms of it that run no layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTS = ("hs", "relu6")
"""The activations of the locality module, without its gates: h-swish (arXiv 1905.02244) and relu6."""


def act_of(layer: nn.Module) -> str | None:
    """The name of a layer that is one of `ACTS`, else None."""
    if isinstance(layer, nn.Hardswish):
        return "hs"
    return "relu6" if isinstance(layer, nn.ReLU6) else None


def activate(u: Tensor, act: str, *, inplace: bool = False) -> Tensor:
    """`act` of `u`, one of `ACTS`."""
    return F.hardswish(u, inplace) if act == "hs" else F.relu6(u, inplace)


def activation_backward(grad: Tensor, u: Tensor, act: str) -> Tensor:
    """The gradient of `u`, from that of `activate(u, act)`."""
    if act == "hs":
        return torch.ops.aten.hardswish_backward(grad, u)
    return torch.ops.aten.hardtanh_backward(grad, u, 0.0, 6.0)
