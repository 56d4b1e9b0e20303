"""Channel gates in the training step by the Triton kernels: a gate's factors, and its gradients.

Gates whose computation is known have a name, by which an operator that torch.compile sees can call them; others run by
their own layers. All work in the dtype of their parameters, without autocast: casting them would take longer than they
do.

Shapes: B batch, E channels, T summands of a gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.ops.dispatch import squeeze_excite_layers
from localvit.ops.gates import scale_with
from localvit.ops.stages import ChannelGate

aten = torch.ops.aten


class Gate(Protocol):
    """A channel gate, whose parameters are given, since they may have changed between the passes."""

    def factors(self, mean_BE: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The factor of each channel, from the means over positions in float32."""

    def backward(
        self, mean_BE: Tensor, parameters: Sequence[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradients of the means and of the parameters."""


class SqueezeExciteGate:
    """Squeeze-and-excitation by its kernels. Its parameters: weight and bias of the two linear layers."""

    def factors(self, mean_BE: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        from localvit.ops.triton.squeeze_excite import squeeze_excite

        return squeeze_excite(mean_BE, 1, *parameters)

    def backward(
        self, mean_BE: Tensor, parameters: Sequence[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        from localvit.ops.triton.squeeze_excite import squeeze_excite_backward

        grad_mean_BE, *gradients = squeeze_excite_backward(grad_gate_TBE, mean_BE, *parameters)
        return grad_mean_BE, gradients


class ConvolutionGate(NamedTuple):
    """ECA by torch's functions: a convolution over the channels. Its parameter: the weight (1, 1, kernel size).

    The gradient is written out, since autograd does not see what an operator computes.
    """

    hard: bool
    """Whether the sigmoid after it is a hard one."""

    def factors(self, mean_BE: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        u_BE = self._convolved(mean_BE, *parameters)
        return F.hardsigmoid(u_BE) if self.hard else u_BE.sigmoid()

    def backward(
        self, mean_BE: Tensor, parameters: Sequence[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        (weight,) = parameters
        grad_BE, u_BE = grad_gate_TBE.sum(0).to(weight.dtype), self._convolved(mean_BE, weight)
        if self.hard:
            grad_BE = aten.hardsigmoid_backward(grad_BE, u_BE)
        else:
            grad_BE = aten.sigmoid_backward(grad_BE, u_BE.sigmoid())
        grad_mean_B1E, grad_weight, _ = aten.convolution_backward(
            *(grad_BE[:, None], mean_BE[:, None].to(weight.dtype), weight, None),
            *([1], [weight.shape[2] // 2], [1], False, [0], 1, [True, True, False]),
        )
        return grad_mean_B1E[:, 0], [grad_weight]

    def _convolved(self, mean_BE: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(mean_BE.device.type, enabled=False):
            return F.conv1d(mean_BE[:, None].to(weight.dtype), weight, padding=weight.shape[2] // 2)[:, 0]


class LayersGate(NamedTuple):
    """A gate by its own layers."""

    module: ChannelGate

    def factors(self, mean_BE: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        with torch.autocast(mean_BE.device.type, enabled=False):
            return self.module.scale(_converted(mean_BE, parameters))

    def backward(
        self, mean_BE: Tensor, parameters: Sequence[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.autocast(mean_BE.device.type, enabled=False):
            scale = scale_with(self.module, list(parameters), _converted(mean_BE, parameters))
            return scale.backward(grad_gate_TBE.sum(0))


def _converted(mean_BE: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The means in the dtype of the gate's parameters, if it has any."""
    return mean_BE.to(parameters[0].dtype) if parameters else mean_BE


KNOWN: dict[str, Gate] = {
    "se": SqueezeExciteGate(),
    "eca": ConvolutionGate(hard=False),
    "ecah": ConvolutionGate(hard=True),
}
"""Gates by their names, as in `localvit.locality.ACTS`."""


def known_gate(gate: ChannelGate) -> tuple[str, tuple[Tensor, ...]] | None:
    """The name in `KNOWN` of what a gate computes, and its parameters; None for others."""
    if (layers := squeeze_excite_layers(gate)) is not None:
        narrow, wide = layers
        return "se", (narrow.weight, narrow.bias, wide.weight, wide.bias)
    if (found := gate.convolution_layers()) is not None:
        conv, sigmoid = found
        return "eca" if type(sigmoid) is nn.Sigmoid else "ecah", (conv.weight,)
    return None


def gate_of(gate: ChannelGate | None) -> tuple[Gate | None, tuple[Tensor, ...]]:
    """How a gate is computed, and its parameters."""
    if gate is None:
        return None, ()
    if (known := known_gate(gate)) is not None:
        name, parameters = known
        return KNOWN[name], parameters
    return LayersGate(gate), tuple(gate.parameters())
