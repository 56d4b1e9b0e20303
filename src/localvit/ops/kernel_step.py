"""The locality module's training step by the Triton kernels: its forward and its backward pass as functions of tensors.

Statistics are computed by what makes a map, normalization, activation and gate by what reads it, and products are
computed again rather than stored. So a step passes 16 times over a hidden map, 5 of them in the forward pass:

- forward: the expansion writes z1; the depth-wise convolution reads it and writes z2; the gate's means and the
  projection read z2;
- backward: the projection's gradients read z2; the second norm's reads z2 and writes; the convolution's reads z1, z2
  and that gradient, and writes; the first norm's reads z1 and that gradient, and writes the gradient of z1, which the
  expansion's weight gradient reads.

Shapes: B batch, C channels outside, E hidden channels, H and W the grid, T summands of a gradient.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from localvit.ops.batch_norms import Running
from localvit.ops.kernel_gates import Gate
from localvit.ops.operands import operands
from localvit.ops.stages import Stages
from localvit.ops.synchronized import gather_statistics, reduce_slopes

if TYPE_CHECKING:
    from localvit.ops.triton.batch_norm import NormGradients
    from localvit.ops.triton.rows import Statistics


class Convolutions(NamedTuple):
    """The weights of the three convolutions, those of the products in the dtype of the computation."""

    expansion_EC: Tensor
    depthwise: Tensor
    projection_CE: Tensor


class Parameters(NamedTuple):
    """Of the convolutions, and of the batch norms between them; those of a gate are kept apart."""

    expansion: Tensor
    weight1_E: Tensor
    bias1_E: Tensor
    depthwise: Tensor
    weight2_E: Tensor
    bias2_E: Tensor
    projection: Tensor

    @classmethod
    def of(cls, stages: Stages) -> "Parameters":
        first, second = stages.stages
        norms = [(stage.norm.weight, stage.norm.bias) for stage in stages.stages]
        return cls(stages.first.weight, *norms[0], first.conv.weight, *norms[1], second.conv.weight)

    def convolutions(self, dtype: torch.dtype) -> Convolutions:
        """In the dtype of a computation."""
        return Convolutions(self.expansion.flatten(1).to(dtype), self.depthwise, self.projection.flatten(1).to(dtype))


def split(parameters: Sequence[Tensor], device: int) -> tuple[Parameters, Sequence[Tensor]]:
    """Parameters that lie one behind the other, and those of the gate behind them, as `operands` of a map's device."""
    number = len(Parameters._fields)
    parameters = operands(parameters, device)
    return Parameters(*parameters[:number]), parameters[number:]


class Norm(NamedTuple):
    """A batch norm that uses the batch's statistics."""

    weight_E: Tensor
    bias_E: Tensor
    running: Running | None
    momentum: float
    eps: float
    group: ProcessGroup | None = None
    """The processes over which the statistics are computed; None for this one only."""


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass, beside its arguments."""

    z1_BHWE: Tensor
    z2_BHWE: Tensor
    norm1_4E: Tensor
    norm2_4E: Tensor
    mean_BE: Tensor | None = None
    gate_BE: Tensor | None = None
    count1: Tensor | None = None
    """Values of each channel in all processes, where the first norm's statistics are over several."""
    count2: Tensor | None = None


def forward(
    x_BHWC: Tensor,
    convolutions: Convolutions,
    norms: tuple[Norm, Norm],
    acts: tuple[str, str],
    gate: Gate | None,
    gate_parameters: Sequence[Tensor],
) -> tuple[Tensor, Kept]:
    """The projection's map (B, H, W, C), before the last batch norm.

    Args:
        x_BHWC: the input, contiguous, in the dtype of the computation.
        norms: the two before the activations.
        acts: the names of the activations, `hs` or `relu6`.
        gate_parameters: none without a gate.
    """
    from localvit.ops.triton import batch_norm, pointwise, training

    expansion_EC, depthwise, projection_CE = convolutions
    z1_BSE, statistics = pointwise.pointwise_with_statistics(x_BHWC.flatten(1, 2), expansion_EC)
    z1_BHWE = z1_BSE.unflatten(1, x_BHWC.shape[1:3])
    norm1_4E, count1 = _norm_vectors(statistics, norms[0])
    z2_BHWE, statistics = training.norm_act_depthwise(z1_BHWE, norm1_4E, depthwise, acts[0])
    norm2_4E, count2 = _norm_vectors(statistics, norms[1])
    mean_BE = gate_BE = None
    if gate is not None:
        mean_BE = batch_norm.channel_means(z2_BHWE, norm2_4E, acts[1])
        gate_BE = gate.factors(mean_BE, 1, gate_parameters)
    out_BSC = pointwise.normalized_pointwise(z2_BHWE.flatten(1, 2), projection_CE, norm2_4E, acts[1], gate_BE)
    kept = Kept(z1_BHWE, z2_BHWE, norm1_4E, norm2_4E, mean_BE, gate_BE, count1, count2)
    return out_BSC.unflatten(1, x_BHWC.shape[1:3]), kept


def _norm_vectors(statistics: "Statistics", norm: Norm) -> tuple[Tensor, Tensor | None]:
    """The vectors of a batch norm, and its number of values if it is over several processes."""
    from localvit.ops.triton.batch_norm import norm_vectors
    from localvit.ops.triton.rows import Statistics

    count = None
    if norm.group is not None:
        statistics = Statistics(*gather_statistics(*statistics, norm.eps, norm.group))
        count = statistics.counts_T.sum()
    return norm_vectors(statistics, norm.weight_E, norm.bias_E, norm.running, norm.momentum, norm.eps), count


def backward(
    grad_out_BHWC: Tensor,
    x_BHWC: Tensor,
    convolutions: Convolutions,
    acts: tuple[str, str],
    gate: Gate | None,
    gate_parameters: Sequence[Tensor],
    kept: Kept,
    dtype: torch.dtype,
    groups: Sequence[ProcessGroup | None] = (None, None),
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of the input, in `dtype`, and of the parameters, those of the gate last; see `forward`."""
    from localvit.ops.triton import pointwise_backward, training_backward

    expansion_EC, depthwise, projection_CE = convolutions
    z1_BHWE, z2_BHWE, norm1_4E, norm2_4E, mean_BE, gate_BE, count1, count2 = kept
    grad_out_BHWC = grad_out_BHWC.contiguous()
    count = z1_BHWE.numel() // z1_BHWE.shape[3]

    grad_projection_CE, grad_gate_TBE = pointwise_backward.projection_gradients(
        grad_out_BHWC, z2_BHWE, norm2_4E, projection_CE, acts[1], gate_BE
    )
    grad_mean_BE: Tensor | None = None
    gate_gradients: Sequence[Tensor | None] = ()
    if gate is not None:
        assert mean_BE is not None
        assert grad_gate_TBE is not None
        grad_mean_BE, gate_gradients = gate.backward(mean_BE, gate_parameters, grad_gate_TBE)
    grad_BHWE, sums_T2E = pointwise_backward.normalized_gradient(
        grad_out_BHWC, z2_BHWE, norm2_4E, projection_CE, acts[1], gate_BE, grad_mean_BE
    )
    second = _norm_gradients(sums_T2E, norm2_4E, count, count2, groups[1])
    grad_BHWE, grad_depthwise_E33, sums_T2E = training_backward.norm_act_depthwise_backward(
        grad_BHWE, z2_BHWE, norm2_4E, second.slopes_3E, z1_BHWE, norm1_4E, depthwise, acts[0]
    )
    first = _norm_gradients(sums_T2E, norm1_4E, count, count1, groups[0])
    grad_x_BHWC, grad_z1_BHWE = pointwise_backward.expansion_gradients(
        grad_BHWE, z1_BHWE, norm1_4E, first.slopes_3E, expansion_EC, dtype
    )
    grad_expansion_EC = grad_z1_BHWE.flatten(0, 2).t() @ x_BHWC.flatten(0, 2)
    first_gradients = grad_expansion_EC, first.weight_E, first.bias_E
    second_gradients = grad_depthwise_E33, second.weight_E, second.bias_E
    return grad_x_BHWC, [*first_gradients, *second_gradients, grad_projection_CE, *gate_gradients]


def _norm_gradients(
    sums_T2E: Tensor, norm_4E: Tensor, own_count: int, count: Tensor | None, group: ProcessGroup | None
) -> "NormGradients":
    """The backward pass of a batch norm, whose gradients of weight and bias are those of this process."""
    from localvit.ops.triton.batch_norm import norm_gradients

    gradients = norm_gradients(sums_T2E, norm_4E, own_count)
    if group is None:
        return gradients
    assert count is not None
    return gradients._replace(slopes_3E=reduce_slopes(*gradients[1:], norm_4E, count, group))
