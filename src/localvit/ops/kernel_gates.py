"""Channel gates beside the Triton kernels: a gate's factors, and its gradients in the training step.

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

from localvit.ops import reference
from localvit.ops.gates import scale_with
from localvit.ops.stages import ChannelGate, parameters_of

aten = torch.ops.aten

WIDEST_BOTTLENECK = 64
"""Of the squeeze-and-excitation gates that a kernel computes, image by image; of wider ones, matrix products of the
batch are faster."""


class Gate(Protocol):
    """A channel gate, whose parameters are given, since they may have changed between the passes."""

    def factors(self, sum_BE: Tensor, positions: int, parameters: Sequence[Tensor]) -> Tensor:
        """The factor of each channel, from the sums over so many positions in float32; of means, over one."""

    def backward(
        self, mean_BE: Tensor, parameters: Sequence[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradients of the means and of the parameters."""


class SqueezeExciteGate:
    """Squeeze-and-excitation. Its parameters: weight and bias of the two linear layers."""

    def factors(self, sum_BE: Tensor, positions: int, parameters: Sequence[Tensor]) -> Tensor:
        if parameters[1].shape[0] > WIDEST_BOTTLENECK:
            return reference.squeeze_excite(sum_BE, positions, *parameters)
        from localvit.ops.triton import squeeze_excite as kernels

        return kernels.squeeze_excite(sum_BE, positions, *parameters)

    def backward(
        self, mean_BE: Tensor, parameters: Sequence[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        if parameters[1].shape[0] > WIDEST_BOTTLENECK:
            return _squeeze_excite_backward(mean_BE, grad_gate_TBE.sum(0), *parameters)
        from localvit.ops.triton import squeeze_excite as kernels

        grad_mean_BE, *gradients = kernels.squeeze_excite_backward(grad_gate_TBE, mean_BE, *parameters)
        return grad_mean_BE, gradients


def _squeeze_excite_backward(
    mean_BE: Tensor, grad_gate_BE: Tensor, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> tuple[Tensor, Sequence[Tensor]]:
    with torch.autocast(mean_BE.device.type, enabled=False):
        mean_BE = mean_BE.to(weight_QE.dtype)
        squeezed_BQ = F.relu(F.linear(mean_BE, weight_QE, bias_Q))
        u_BE = F.linear(squeezed_BQ, weight_EQ, bias_E)
        grad_BE = aten.hardsigmoid_backward(grad_gate_BE.to(u_BE.dtype), u_BE)
        grad_BQ = aten.threshold_backward(grad_BE @ weight_EQ, squeezed_BQ, 0)
        narrow = grad_BQ.t() @ mean_BE, grad_BQ.sum(0)
        wide = grad_BE.t() @ squeezed_BQ, grad_BE.sum(0)
        return grad_BQ @ weight_QE, [*narrow, *wide]


class ConvolutionGate(NamedTuple):
    """ECA by torch's functions: a convolution over the channels. Its parameter: the weight (1, 1, kernel size).

    The gradient is written out, since autograd does not see what an operator computes.
    """

    hard: bool
    """Whether the sigmoid after it is a hard one."""

    def factors(self, sum_BE: Tensor, positions: int, parameters: Sequence[Tensor]) -> Tensor:
        with torch.autocast(sum_BE.device.type, enabled=False):
            return reference.channel_attention(sum_BE, positions, *parameters, hard=self.hard)

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

    def factors(self, sum_BE: Tensor, positions: int, parameters: Sequence[Tensor]) -> Tensor:
        with torch.autocast(sum_BE.device.type, enabled=False):
            dtype = parameters[0].dtype if parameters else sum_BE.dtype
            return self.module.scale(reference.means(sum_BE, positions, dtype))

    def backward(
        self, mean_BE: Tensor, parameters: Sequence[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.autocast(mean_BE.device.type, enabled=False):
            dtype = parameters[0].dtype if parameters else mean_BE.dtype
            scale = scale_with(self.module, list(parameters), mean_BE.to(dtype))
            return scale.backward(grad_gate_TBE.sum(0))


KNOWN: dict[str, Gate] = {
    "se": SqueezeExciteGate(),
    "eca": ConvolutionGate(hard=False),
    "ecah": ConvolutionGate(hard=True),
}
"""Gates by their names, those of `reference.GATES`."""


def known_gate(gate: ChannelGate) -> tuple[str, tuple[Tensor, ...]] | None:
    """The name in `KNOWN` of what a gate computes, and its parameters; None for others."""
    if (layers := gate.linear_layers()) is not None:
        narrow, wide = layers
        return "se", (*parameters_of(narrow), *parameters_of(wide))
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
