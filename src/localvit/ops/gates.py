"""A channel gate's factors computed again in a backward pass, with the parameters of the forward pass.

Shapes: B batch, E channels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class GateScale(NamedTuple):
    """A gate's factors with their graph."""

    scale_BE: Tensor
    mean_BE: Tensor
    parameters: list[Tensor]

    def backward(self, grad_scale_BE: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the means and of the gate's parameters; None for a frozen one."""
        wanted = [self.mean_BE, *(each for each in self.parameters if each.requires_grad)]
        grad_mean_BE, *found = torch.autograd.grad(self.scale_BE, wanted, grad_scale_BE.to(self.scale_BE.dtype))
        return grad_mean_BE, [found.pop(0) if each.requires_grad else None for each in self.parameters]


def scale_with(gate: nn.Module, parameters: list[Tensor], mean_BE: Tensor) -> GateScale:
    """The factors of a gate with other parameters than its own, which may have changed since the forward pass."""
    names = [f"gate.{name}" for name, _ in gate.named_parameters()]
    with torch.enable_grad():
        mean_BE = mean_BE.detach().requires_grad_()
        own = dict(zip(names, parameters, strict=True))
        return GateScale(torch.func.functional_call(_Scale(gate), own, (mean_BE,)), mean_BE, parameters)


class _Scale(nn.Module):
    """A gate's factors as a module's forward, so that `functional_call` can substitute its parameters."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.gate: Any = gate

    def forward(self, mean_BE: Tensor) -> Tensor:
        return self.gate.scale(mean_BE)
