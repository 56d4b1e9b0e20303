"""The locality module in training by the Triton kernels: no pass over memory only for statistics or normalization.

Statistics are computed by what makes a map, normalization, activation and gate by what reads it, and products are
computed again rather than stored. So a step passes 16 times over a hidden map, 5 of them in the forward pass:

- forward: the expansion writes z1; the depth-wise convolution reads it and writes z2; the gate's means and the
  projection read z2;
- backward: the projection's gradients read z2; the second norm's reads z2 and writes; the convolution's reads z1, z2
  and that gradient, and writes; the first norm's reads z1 and that gradient, and writes the gradient of z1, which the
  expansion's weight gradient reads.

Shapes: B batch, C channels outside, E hidden channels, H and W the grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from localvit.ops.batch_norms import is_recomputation
from localvit.ops.dispatch import squeeze_excite_layers
from localvit.ops.gates import scale_with
from localvit.ops.stages import ChannelGate, Stages


def feed_forward(stages: Stages, map_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """The map before the last batch norm (B, C, H, W), channels-last, computed in bfloat16 or float16.

    Args:
        stages: those that `localvit.ops.dispatch.fits_kernels` accepts.
        map_BCHW: the input, in any memory format.
        dtype: of the computation; batch norms work in float32.
    """
    first, second = stages.stages
    gate = None if second.gate is None else _Gate(second.gate)
    tensors = (
        stages.first.weight,
        first.norm.weight,
        first.norm.bias,
        first.conv.weight,
        second.norm.weight,
        second.norm.bias,
        second.conv.weight,
        *(() if gate is None else gate.parameters),
    )
    out_BHWC = _FeedForward.apply(stages, gate, dtype, map_BCHW.permute(0, 2, 3, 1), *tensors)
    return out_BHWC.permute(0, 3, 1, 2)


class _FeedForward(torch.autograd.Function):
    """From the input to the projection, (B, H, W, C) in and out."""

    @staticmethod
    def forward(
        ctx: Any,
        stages: Stages,
        gate: "_Gate | None",
        dtype: torch.dtype,
        x_BHWC: Tensor,
        expansion: Tensor,
        weight1_E: Tensor,
        bias1_E: Tensor,
        depthwise: Tensor,
        weight2_E: Tensor,
        bias2_E: Tensor,
        projection: Tensor,
        *gate_parameters: Tensor,
    ) -> Tensor:
        from localvit.ops.triton import batch_norm, pointwise, training

        (norm1, act1, _, _), (norm2, act2, _, _) = stages.stages
        expansion_EC, projection_CE = (weight.flatten(1).to(dtype) for weight in (expansion, projection))
        # Under autocast x is in float32: the copy is what both products read, and what the backward pass keeps.
        grid_size, x_BSC = x_BHWC.shape[1:3], x_BHWC.to(dtype).flatten(1, 2).contiguous()
        z1_BSE, statistics = pointwise.pointwise_with_statistics(x_BSC, expansion_EC)
        z1_BHWE = z1_BSE.unflatten(1, grid_size)
        norm1_4E = batch_norm.norm_vectors(statistics, weight1_E, bias1_E, *_running(norm1))
        z2_BHWE, statistics = training.norm_act_depthwise(z1_BHWE, norm1_4E, depthwise, act1)
        norm2_4E = batch_norm.norm_vectors(statistics, weight2_E, bias2_E, *_running(norm2))
        mean_BE = gate_BE = None
        if gate is not None:
            mean_BE = batch_norm.channel_means(z2_BHWE, norm2_4E, act2)
            gate_BE = gate.factors(mean_BE, gate_parameters)
        out_BSC = pointwise.normalized_pointwise(z2_BHWE.flatten(1, 2), projection_CE, norm2_4E, act2, gate_BE)

        ctx.stages, ctx.gate, ctx.dtype = stages, gate, x_BHWC.dtype
        ctx.shapes = [weight.shape for weight in (expansion, projection)]
        ctx.save_for_backward(
            *(x_BSC, z1_BHWE, z2_BHWE, norm1_4E, norm2_4E, mean_BE, gate_BE),
            *(expansion_EC, depthwise, projection_CE, *gate_parameters),
        )
        return out_BSC.unflatten(1, grid_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BHWC: Tensor) -> tuple[Any, ...]:
        from localvit.ops.triton import batch_norm, pointwise_backward, training_backward

        (norm1, act1, _, _), (norm2, act2, _, second_conv) = ctx.stages.stages
        gate: _Gate | None = ctx.gate
        x_BSC, z1_BHWE, z2_BHWE, norm1_4E, norm2_4E, mean_BE, gate_BE, *parameters = ctx.saved_tensors
        expansion_EC, depthwise, projection_CE, *gate_parameters = parameters
        grad_out_BHWC = grad_out_BHWC.contiguous()
        count = z1_BHWE.numel() // z1_BHWE.shape[3]

        grad_projection_CE, grad_gate_TBE = pointwise_backward.projection_gradients(
            grad_out_BHWC, z2_BHWE, norm2_4E, projection_CE, act2, gate_BE
        )
        grad_mean_BE: Tensor | None = None
        gate_gradients: list[Tensor | None] = []
        if gate is not None:
            assert grad_gate_TBE is not None
            grad_mean_BE, gate_gradients = gate.backward(mean_BE, gate_parameters, grad_gate_TBE)
        grad_BHWE, sums_T2E = pointwise_backward.normalized_gradient(
            grad_out_BHWC, z2_BHWE, norm2_4E, projection_CE, act2, gate_BE, grad_mean_BE
        )
        second = batch_norm.norm_gradients(sums_T2E, norm2_4E, count)
        grad_BHWE, grad_depthwise_E33, sums_T2E = training_backward.norm_act_depthwise_backward(
            grad_BHWE, z2_BHWE, norm2_4E, second.slopes_3E, z1_BHWE, norm1_4E, depthwise, act1
        )
        first = batch_norm.norm_gradients(sums_T2E, norm1_4E, count)
        grad_x_BHWC, grad_z1_BHWE = pointwise_backward.expansion_gradients(
            grad_BHWE, z1_BHWE, norm1_4E, first.slopes_3E, expansion_EC, ctx.dtype
        )
        grad_expansion_EC = grad_z1_BHWE.flatten(0, 2).t() @ x_BSC.flatten(0, 1)
        expansion_shape, projection_shape = ctx.shapes
        return (
            *(None, None, None, grad_x_BHWC),
            grad_expansion_EC.view(expansion_shape).to(ctx.stages.first.weight.dtype),
            *(first.weight_E.to(norm1.weight.dtype), first.bias_E.to(norm1.bias.dtype)),
            grad_depthwise_E33.view_as(depthwise).to(depthwise.dtype),
            *(second.weight_E.to(norm2.weight.dtype), second.bias_E.to(norm2.bias.dtype)),
            grad_projection_CE.view(projection_shape).to(second_conv.weight.dtype),
            *gate_gradients,
        )


class _Gate:
    """A channel gate in one step: by its kernels if it has them, which is decided once, else by its own layers."""

    def __init__(self, gate: ChannelGate) -> None:
        layers = squeeze_excite_layers(gate)
        self.module = gate
        self.has_kernels = layers is not None
        self.parameters: tuple[Tensor, ...]
        if layers is None:
            self.parameters = tuple(gate.parameters())
        else:
            narrow, wide = layers
            self.parameters = narrow.weight, narrow.bias, wide.weight, wide.bias

    def factors(self, mean_BE: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The factor of each channel, from the means over positions in float32."""
        from localvit.ops.triton.squeeze_excite import squeeze_excite

        if self.has_kernels:
            return squeeze_excite(mean_BE, 1, *parameters)
        with _full_precision(mean_BE):
            return self.module.scale(_converted(mean_BE, parameters))

    def backward(
        self, mean_BE: Tensor, parameters: list[Tensor], grad_gate_TBE: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of the means and of the parameters, which are those of the forward pass."""
        from localvit.ops.triton.squeeze_excite import squeeze_excite_backward

        if self.has_kernels:
            grad_mean_BE, *found = squeeze_excite_backward(grad_gate_TBE, mean_BE, *parameters)
            pairs = zip(found, parameters, strict=True)
            return grad_mean_BE, [grad.to(each.dtype) if each.requires_grad else None for grad, each in pairs]
        with _full_precision(mean_BE):
            scale = scale_with(self.module, parameters, _converted(mean_BE, parameters))
            return scale.backward(grad_gate_TBE.sum(0))


def _full_precision(x: Tensor) -> torch.autocast:
    """No autocast: the gate's layers are small, and casting their weights would take longer than they do."""
    return torch.autocast(x.device.type, enabled=False)


def _converted(mean_BE: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The means in the dtype of the gate's parameters, if it has any."""
    return mean_BE.to(parameters[0].dtype) if parameters else mean_BE


def _running(norm: Any) -> tuple[Any, float, float]:
    """What a batch norm updates (None where a forward pass is repeated), its momentum and its epsilon."""
    from localvit.ops.triton.batch_norm import Running

    statistics = Running(norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return None if is_recomputation() else statistics, norm.momentum, norm.eps
