"""The locality module's training step by the Triton kernels, as one node of autograd's graph.

Shapes: B batch, C channels outside, E hidden channels, H and W the grid.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from localvit.ops import kernel_step
from localvit.ops.batch_norms import Running, is_recomputation
from localvit.ops.kernel_gates import Gate, gate_of
from localvit.ops.kernel_step import Convolutions, Kept, Norm, Parameters, split
from localvit.ops.stages import Stages
from localvit.ops.synchronized import group_of


def feed_forward(stages: Stages, map_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """The map before the last batch norm (B, C, H, W), channels-last, computed in bfloat16 or float16.

    Args:
        stages: those that `localvit.ops.dispatch.fits_kernels` accepts.
        map_BCHW: the input, in any memory format.
        dtype: of the computation; batch norms work in float32.
    """
    gate, gate_parameters = gate_of(stages.stages[1].gate)
    parameters = *Parameters.of(stages), *gate_parameters
    out_BHWC = _FeedForward.apply(stages, gate, dtype, map_BCHW.permute(0, 2, 3, 1), *parameters)
    return out_BHWC.permute(0, 3, 1, 2)


class _FeedForward(torch.autograd.Function):
    """From the input to the projection, (B, H, W, C) in and out."""

    @staticmethod
    def forward(
        ctx: Any,
        stages: Stages,
        gate: Gate | None,
        dtype: torch.dtype,
        x_BHWC: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        (norm1, act1, _, _), (norm2, act2, _, _) = stages.stages
        own, gate_parameters = split(parameters, x_BHWC.get_device())
        ctx.gate, ctx.acts, ctx.dtype = gate, (act1, act2), x_BHWC.dtype
        ctx.forms = [(each.shape, each.dtype) for each in parameters]
        convolutions = own.convolutions(dtype)
        norms = _norm(norm1, own.weight1_E, own.bias1_E), _norm(norm2, own.weight2_E, own.bias2_E)
        ctx.groups = [norm.group for norm in norms]
        # Under autocast x is in float32: the copy is what both products read, and what the backward pass keeps.
        x_BHWC = x_BHWC.to(dtype).contiguous()
        out_BHWC, kept = kernel_step.forward(x_BHWC, convolutions, norms, ctx.acts, gate, gate_parameters)
        ctx.save_for_backward(x_BHWC, *convolutions, *kept, *gate_parameters)
        return out_BHWC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BHWC: Tensor) -> tuple[Any, ...]:
        x_BHWC, *saved = ctx.saved_tensors
        convolutions, saved = Convolutions(*saved[:3]), saved[3:]
        kept, gate_parameters = Kept(*saved[: len(Kept._fields)]), saved[len(Kept._fields) :]
        grad_x_BHWC, gradients = kernel_step.backward(
            grad_out_BHWC, x_BHWC, convolutions, ctx.acts, ctx.gate, gate_parameters, kept, ctx.dtype, ctx.groups
        )
        pairs = zip(gradients, ctx.forms, strict=True)
        return (
            *(None, None, None, grad_x_BHWC),
            *(None if grad is None else grad.view(shape).to(dtype) for grad, (shape, dtype) in pairs),
        )


def _norm(norm: Any, weight_E: Tensor, bias_E: Tensor) -> Norm:
    """A batch norm, whose running statistics stay as they are where a forward pass is repeated."""
    running = Running(norm.running_mean, norm.running_var, norm.num_batches_tracked)
    updated = None if is_recomputation() else running
    return Norm(weight_E, bias_E, updated, norm.momentum, norm.eps, group_of(norm))
