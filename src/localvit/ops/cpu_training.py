"""The locality module's training step on the CPU in float32, as one node of autograd's graph: products by torch, and
what lies between them by `localvit.ops.cpu_kernels`.

Statistics are computed by the pass that makes a map, normalization, activation and gate by the pass that reads it, and
normalized maps are computed again rather than stored. The step passes 16 times over a hidden map, beside its products,
where the layers one by one pass nearly thirty times.

Shapes: B batch, C channels outside, E hidden channels, H and W the grid, N = B * H * W rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from localvit.ops import cpu_kernels
from localvit.ops.batch_norms import is_recomputation
from localvit.ops.gates import scale_with
from localvit.ops.stages import Stages


def feed_forward(stages: Stages, map_BCHW: Tensor) -> Tensor:
    """The map before the last batch norm (B, C, H, W), channels-last.

    Args:
        stages: those that `localvit.ops.dispatch.fits_cpu_kernels` accepts.
        map_BCHW: the input, in any memory format.
    """
    (norm1, _, _, depthwise), (norm2, _, gate, projection) = stages.stages
    norms = norm1.weight, norm1.bias, norm2.weight, norm2.bias
    weights = stages.first.weight, depthwise.weight, projection.weight
    gate_parameters = () if gate is None else gate.parameters()
    out_BHWC = _CpuFeedForward.apply(stages, map_BCHW.permute(0, 2, 3, 1), *weights, *norms, *gate_parameters)
    return out_BHWC.permute(0, 3, 1, 2)


class _CpuFeedForward(torch.autograd.Function):
    """From the input to the projection, (B, H, W, C) in and out. Saves the two hidden maps that batch norms read."""

    @staticmethod
    def forward(
        ctx: Any,
        stages: Stages,
        x_BHWC: Tensor,
        expansion: Tensor,
        depthwise: Tensor,
        projection: Tensor,
        weight1_E: Tensor,
        bias1_E: Tensor,
        weight2_E: Tensor,
        bias2_E: Tensor,
        *gate_parameters: Tensor,
    ) -> Tensor:
        (norm1, act, _, _), (norm2, _, gate, _) = stages.stages
        weight_9E = depthwise.flatten(1).t().contiguous()
        z1_BHWE = x_BHWC.contiguous() @ expansion.flatten(1).t()
        norm1_4E = _normalize(norm1, cpu_kernels.moments(z1_BHWE), z1_BHWE)
        z2_BHWE, moments_B2E = cpu_kernels.norm_act_depthwise(z1_BHWE, norm1_4E, weight_9E, act)
        norm2_4E = _normalize(norm2, moments_B2E, z2_BHWE)
        mean_BE, gate_BE = None, torch.ones_like(moments_B2E[:, 0])
        if gate is not None:
            mean_BE = cpu_kernels.norm_act_means(z2_BHWE, norm2_4E, act)
            gate_BE = gate.scale(mean_BE).contiguous()
        gated_BHWE = cpu_kernels.norm_act_gate(z2_BHWE, norm2_4E, gate_BE, act)
        ctx.stages = stages
        ctx.save_for_backward(
            *(x_BHWC, expansion, weight_9E, projection, z1_BHWE, z2_BHWE, norm1_4E, norm2_4E, mean_BE),
            *gate_parameters,
        )
        return gated_BHWE @ projection.flatten(1).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BHWC: Tensor) -> tuple[Any, ...]:
        x_BHWC, expansion, weight_9E, projection, z1_BHWE, z2_BHWE, norm1_4E, norm2_4E, mean_BE, *gate_parameters = (
            ctx.saved_tensors
        )
        (_, act, _, _), (_, _, gate, _) = ctx.stages.stages
        _, needs_x, needs_expansion, _, needs_projection, *_ = ctx.needs_input_grad
        grad_out_BHWC = grad_out_BHWC.contiguous()
        grad_BHWE = grad_out_BHWC @ projection.flatten(1)

        scale = None if gate is None else scale_with(gate, gate_parameters, mean_BE)
        gate_BE = torch.ones_like(grad_BHWE[:, 0, 0]) if scale is None else scale.scale_BE.detach().contiguous()
        gated_BHWE, sums_B5E = cpu_kernels.norm_act_gate_backward(grad_BHWE, z2_BHWE, norm2_4E, gate_BE, act)
        grad_projection = _weight_gradient(grad_out_BHWC, gated_BHWE, projection) if needs_projection else None
        del gated_BHWE
        grad_mean_BE, gate_gradients = (
            (torch.zeros_like(gate_BE), []) if scale is None else scale.backward(sums_B5E[:, 0])
        )
        # The gradient of an activated value is that of the gated one times the first, plus the second.
        gate_B2E = torch.stack((gate_BE, grad_mean_BE / (z2_BHWE.shape[1] * z2_BHWE.shape[2])), 1)

        second = _NormGradients.of(
            (gate_B2E * sums_B5E[:, 1:3]).sum((0, 1)), (gate_B2E * sums_B5E[:, 3:5]).sum((0, 1)), norm2_4E, z2_BHWE
        )
        weight_sums_B9E, sums_B2E = cpu_kernels.norm_act_depthwise_backward_(
            grad_BHWE, z2_BHWE, norm2_4E, gate_B2E, second.slopes_3E[1:], z1_BHWE, norm1_4E, weight_9E, act
        )
        grad_depthwise = weight_sums_B9E.sum(0).t().reshape(-1, 1, 3, 3)
        first = _NormGradients.of(sums_B2E[:, 0].sum(0), sums_B2E[:, 1].sum(0), norm1_4E, z1_BHWE)
        cpu_kernels.norm_backward_(grad_BHWE, z1_BHWE, norm1_4E, first.slopes_3E)
        grad_x_BHWC = grad_BHWE @ expansion.flatten(1) if needs_x else None
        grad_expansion = _weight_gradient(grad_BHWE, x_BHWC, expansion) if needs_expansion else None
        weights = grad_expansion, grad_depthwise, grad_projection
        norms = first.weight_E, first.bias_E, second.weight_E, second.bias_E
        return None, grad_x_BHWC, *weights, *norms, *gate_gradients


def _normalize(norm: Any, moments_B2E: Tensor, z_BHWE: Tensor) -> Tensor:
    """A batch norm's vectors (4, E) from the moments of each image; the running statistics are updated."""
    means_BE, squares_BE = moments_B2E.unbind(1)
    batch, height, width, _ = z_BHWE.shape
    count = batch * height * width
    mean_E = means_BE.mean(0)
    square_E = squares_BE.sum(0) + height * width * (means_BE - mean_E).square().sum(0)
    if not is_recomputation():
        norm.running_mean.lerp_(mean_E, norm.momentum)
        norm.running_var.lerp_(square_E / (count - 1), norm.momentum)
        norm.num_batches_tracked.add_(1)
    inverse_E = (square_E / count + norm.eps).rsqrt()
    return torch.stack((mean_E, norm.weight * inverse_E, norm.bias, inverse_E))


class _NormGradients(NamedTuple):
    """The gradients of a batch norm's weight and bias, and how that of its input z follows from that of its output.

    The three slopes: the factor of the gradient, that of the deviation of z from the mean, and a summand.
    """

    weight_E: Tensor
    bias_E: Tensor
    slopes_3E: Tensor

    @classmethod
    def of(cls, sum_E: Tensor, sum_deviation_E: Tensor, norm_4E: Tensor, z_BHWE: Tensor) -> "_NormGradients":
        """From the sums of the output's gradient, and of it times the deviation of z from the mean."""
        _, scale_E, _, inverse_E = norm_4E
        share = z_BHWE.shape[3] / z_BHWE.numel()
        weight_E = sum_deviation_E * inverse_E
        slopes = scale_E, -share * scale_E * inverse_E * weight_E, -share * scale_E * sum_E
        return cls(weight_E, sum_E, torch.stack(slopes))


def _weight_gradient(grad_BHWF: Tensor, x_BHWC: Tensor, weight: Tensor) -> Tensor:
    return (grad_BHWF.flatten(0, 2).t() @ x_BHWC.flatten(0, 2)).view_as(weight)
