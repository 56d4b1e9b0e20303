"""The locality module in training with less memory: the same numbers and gradients from about half of it.

Autograd keeps every map between two layers. Here the backward pass keeps only the maps that batch norms read, and
computes the normalized, activated and gated maps again, which costs little. Channels lie last, as tokens have them, so
that 1x1 convolutions are matrix products.

Shapes: B batch, C input channels, E channels of a map between two convolutions, F those after it, H and W the grid.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localvit.ops import compiled_training, cpu_training, kernel_training
from localvit.ops.activations import activate, activation_backward
from localvit.ops.batch_norms import is_recomputation, run_layers
from localvit.ops.dispatch import fits_cpu_kernels, training_path
from localvit.ops.gates import scale_with
from localvit.ops.stages import Stage, Stages, channel_means

aten = torch.ops.aten


def feed_forward(layers: nn.Sequential, map_BCHW: Tensor) -> Tensor:
    """Run a locality module's layers on a map (B, C, H, W): by kernels or recomputing where that gives the same."""
    path = training_path(layers, map_BCHW)
    if path is None:
        return run_layers(layers, map_BCHW)
    stages, dtype = path
    if dtype is not None:
        training = compiled_training if torch.compiler.is_compiling() else kernel_training
        out_BCHW = training.feed_forward(stages, map_BCHW, dtype)
    elif fits_cpu_kernels(stages, map_BCHW):
        out_BCHW = cpu_training.feed_forward(stages, map_BCHW)
    else:
        out_BCHW = _recompute(stages, map_BCHW)
    return run_layers(stages.last_norm, out_BCHW)


def _recompute(stages: Stages, map_BCHW: Tensor) -> Tensor:
    z_BHWE = _convolve(map_BCHW.permute(0, 2, 3, 1), stages.first.weight, _Geometry.of(stages.first))
    updates = not is_recomputation()
    for stage in stages.stages:
        norm, gate = stage.norm, stage.gate
        running = (norm.running_mean, norm.running_var) if updates else (None, None)
        gate_parameters = () if gate is None else gate.parameters()
        z_BHWE = _NormActConv.apply(
            stage, running, z_BHWE.contiguous(), norm.weight, norm.bias, stage.conv.weight, *gate_parameters
        )
        if updates:
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # training_path checks it
    return z_BHWE.permute(0, 3, 1, 2)


_Running = tuple[Tensor | None, Tensor | None]
"""Running mean and variance that a batch norm updates; None for none."""


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "_Geometry":
        assert not isinstance(conv.padding, str)
        return cls(conv.stride, conv.padding, conv.groups)


class _NormActConv(torch.autograd.Function):
    """Batch norm, activation, gate and convolution as one step that saves only its input map: (B, H, W, E) in and out.

    Autograd would save the input, the normalized, the activated and the gated map.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stage: Stage,
        running: _Running,
        z_BHWE: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        *gate_parameters: Tensor,
    ) -> Tensor:
        norm: Any = stage.norm
        y_BEHW, mean_E, inverse_deviation_E = torch.native_batch_norm(
            z_BHWE.permute(0, 3, 1, 2),
            norm_weight,
            norm_bias,
            *running,
            training=True,
            momentum=norm.momentum,
            eps=norm.eps,
        )
        a_BHWE = activate(y_BEHW.permute(0, 2, 3, 1), stage.act, inplace=True)
        mean_BE = None
        if stage.gate is not None:
            mean_BE = channel_means(a_BHWE)
            a_BHWE.mul_(stage.gate.scale(mean_BE)[:, None, None])
        ctx.stage = stage
        kind = z_BHWE.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(
            z_BHWE, norm_weight, norm_bias, weight, mean_E, inverse_deviation_E, mean_BE, *gate_parameters
        )
        return _convolve(a_BHWE, weight.to(z_BHWE.dtype), _Geometry.of(stage.conv))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_BHWF: Tensor) -> tuple[Any, ...]:
        stage: Stage = ctx.stage
        z_BHWE, norm_weight, norm_bias, weight, mean_E, inverse_deviation_E, mean_BE, *gate_parameters = (
            ctx.saved_tensors
        )
        z_BEHW = z_BHWE.permute(0, 3, 1, 2)
        # In evaluation mode with the batch's statistics; the deviation already includes the epsilon.
        y_BEHW, _, _ = torch.native_batch_norm(
            z_BEHW,
            norm_weight,
            norm_bias,
            mean_E,
            inverse_deviation_E.pow(-2),
            training=False,
            momentum=0.0,
            eps=0.0,
        )
        y_BHWE = y_BEHW.permute(0, 2, 3, 1)
        a_BHWE = activate(y_BHWE, stage.act)
        needs_z, needs_norm_weight, needs_norm_bias, needs_weight = ctx.needs_input_grad[2:6]

        geometry, narrow_weight = _Geometry.of(stage.conv), weight.to(z_BHWE.dtype)
        grad_a_BHWE = _input_gradient(grad_out_BHWF, a_BHWE, narrow_weight, geometry)
        gate_gradients: list[Tensor | None] = []
        if stage.gate is not None:
            with ctx.autocast:
                scale = scale_with(stage.gate, gate_parameters, mean_BE)
            grad_mean_BE, gate_gradients = scale.backward((grad_a_BHWE * a_BHWE).flatten(1, 2).sum(1))
            scale_B11E, grad_mean_B11E = scale.scale_BE.detach()[:, None, None], grad_mean_BE[:, None, None]
            a_BHWE.mul_(scale_B11E)
            grad_a_BHWE.mul_(scale_B11E).add_(grad_mean_B11E, alpha=1 / (a_BHWE.shape[1] * a_BHWE.shape[2]))
        grad_weight = None
        if needs_weight:
            grad_weight = _weight_gradient(grad_out_BHWF, a_BHWE, narrow_weight, geometry).to(weight.dtype)
        del a_BHWE

        grad_y_BHWE = activation_backward(grad_a_BHWE, y_BHWE, stage.act)
        grad_z_BEHW, grad_norm_weight, grad_norm_bias = aten.native_batch_norm_backward(
            grad_y_BHWE.permute(0, 3, 1, 2),
            z_BEHW,
            norm_weight,
            None,
            None,
            mean_E,
            inverse_deviation_E,
            True,
            stage.norm.eps,
            [needs_z, needs_norm_weight, needs_norm_bias],
        )
        grad_z_BHWE = grad_z_BEHW.permute(0, 2, 3, 1) if needs_z else None
        return None, None, grad_z_BHWE, grad_norm_weight, grad_norm_bias, grad_weight, *gate_gradients


def _convolve(x_BHWC: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    if geometry.groups == 1:
        return F.linear(x_BHWC, weight.flatten(1))
    out_BCHW = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, **geometry._asdict())
    return out_BCHW.permute(0, 2, 3, 1)


def _input_gradient(grad_out_BHWF: Tensor, x_BHWC: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    if geometry.groups == 1:
        return grad_out_BHWF @ weight.flatten(1)
    return _depthwise_backward(grad_out_BHWF, x_BHWC, weight, geometry, [True, False, False])[0].permute(0, 2, 3, 1)


def _weight_gradient(grad_out_BHWF: Tensor, x_BHWC: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    if geometry.groups == 1:
        return (grad_out_BHWF.flatten(0, 2).T @ x_BHWC.flatten(0, 2)).view_as(weight)
    return _depthwise_backward(grad_out_BHWF, x_BHWC, weight, geometry, [False, True, False])[1]


def _depthwise_backward(
    grad_out_BHWF: Tensor, x_BHWC: Tensor, weight: Tensor, geometry: _Geometry, wanted: list[bool]
) -> tuple[Tensor, ...]:
    stride, padding, groups = geometry
    grad_out_BFHW, x_BCHW = grad_out_BHWF.permute(0, 3, 1, 2), x_BHWC.permute(0, 3, 1, 2)
    return aten.convolution_backward(
        grad_out_BFHW, x_BCHW, weight, None, stride, padding, (1, 1), False, (0, 0), groups, wanted
    )
