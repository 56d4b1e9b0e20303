"""The operators of `localvit.ops.kernels` as torch's dispatcher knows them, under `torch.ops.localvit`.

So `torch.compile` and `torch.export` see each as one node, and run it on whatever it is given: by Triton on CUDA where
the kernels are in use and the map suits them, else in plain torch. They are opaque (`custom_op`, no `triton_op`) for
that choice wants the tensors as they are: their strides, and how they lie in memory.

Shapes: B batch, H and W the grid, E channels.
"""

from typing import Any

import torch
from torch import Tensor

from localvit.ops import reference as plain
from localvit.ops.switch import in_use

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of maps that the kernels read."""


def _by_triton(*maps: Tensor) -> bool:
    # The kernels are launched for NVIDIA's registers; to torch AMD's devices are `cuda` too.
    return (
        in_use()
        and torch.version.hip is None
        and all(
            map_BHWE.is_cuda and map_BHWE.dtype in DTYPES and map_BHWE.numel() > 0 and map_BHWE.stride(3) == 1
            for map_BHWE in maps
        )
    )


@torch.library.custom_op("localvit::depthwise_act_pool", mutates_args=())
def depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """See `localvit.ops.kernels.depthwise_act_pool`."""
    if _by_triton(x_BHWE):
        from localvit.ops.triton import inference as inference_triton

        return inference_triton.depthwise_act_pool(x_BHWE, weight_E33, bias_E, act)
    y_BHWE, sum_BE = plain.depthwise_act_pool(x_BHWE, weight_E33, bias_E, act)
    return y_BHWE.contiguous(), sum_BE


@depthwise_act_pool.register_fake
def _(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    plain.check(x_BHWE, weight_E33, act, bias=bias_E)
    sum_shape = (x_BHWE.shape[0], x_BHWE.shape[3])
    return x_BHWE.new_empty(x_BHWE.shape), x_BHWE.new_empty(sum_shape, dtype=plain.accumulate_dtype(x_BHWE))


def _keep_for_pool(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _depthwise_act_pool_backward(ctx: Any, grad_y_BHWE: Tensor, grad_sum_BE: Tensor) -> tuple:
    x_BHWE, weight_E33, bias_E = ctx.saved_tensors
    grads = plain.depthwise_act_pool_backward(grad_y_BHWE, grad_sum_BE, x_BHWE, weight_E33, bias_E, ctx.act)
    return (*grads, None)


depthwise_act_pool.register_autograd(_depthwise_act_pool_backward, setup_context=_keep_for_pool)


@torch.library.custom_op("localvit::norm_act_depthwise", mutates_args=())
def norm_act_depthwise(
    z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor, weight_E33: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `localvit.ops.kernels.norm_act_depthwise`."""
    if _by_triton(z_BHWE):
        from localvit.ops.triton import training as training_triton

        return training_triton.norm_act_depthwise(z_BHWE, scale_E, shift_E, weight_E33, act)
    out_BHWE, mean_E, variance_E = plain.norm_act_depthwise(z_BHWE, scale_E, shift_E, weight_E33, act)
    return out_BHWE.contiguous(), mean_E, variance_E


@norm_act_depthwise.register_fake
def _(z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor, weight_E33: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    plain.check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E)
    mean_E, variance_E = (z_BHWE.new_empty(z_BHWE.shape[3], dtype=plain.accumulate_dtype(z_BHWE)) for _ in range(2))
    return z_BHWE.new_empty(z_BHWE.shape), mean_E, variance_E


@torch.library.custom_op("localvit::norm_act_depthwise_backward", mutates_args=())
def norm_act_depthwise_backward(
    grad_out_BHWE: Tensor,
    z_BHWE: Tensor,
    scale_E: Tensor,
    shift_E: Tensor,
    weight_E33: Tensor,
    center_E: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `localvit.ops.kernels.norm_act_depthwise_backward`."""
    tensors = (grad_out_BHWE, z_BHWE, scale_E, shift_E, weight_E33, center_E)
    if _by_triton(grad_out_BHWE, z_BHWE):
        from localvit.ops.triton import training_backward as training_backward_triton

        return training_backward_triton.norm_act_depthwise_backward(*tensors, act)
    grad_u_BHWE, grad_weight_E33, sums_2E = plain.norm_act_depthwise_backward(*tensors, act)
    return grad_u_BHWE.contiguous(), grad_weight_E33.contiguous(), sums_2E


@norm_act_depthwise_backward.register_fake
def _(
    grad_out_BHWE: Tensor,
    z_BHWE: Tensor,
    scale_E: Tensor,
    shift_E: Tensor,
    weight_E33: Tensor,
    center_E: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plain.check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E, center=center_E)
    plain.check_gradient(grad_out_BHWE, z_BHWE)
    dtype = plain.accumulate_dtype(z_BHWE)
    grad_weight_E33 = z_BHWE.new_empty(weight_E33.shape, dtype=dtype)
    return z_BHWE.new_empty(z_BHWE.shape), grad_weight_E33, z_BHWE.new_empty((2, z_BHWE.shape[3]), dtype=dtype)


def _keep_for_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])


def _norm_act_depthwise_backward(ctx: Any, grad_out_BHWE: Tensor, *moments: Any) -> tuple:
    z_BHWE, scale_E, shift_E, weight_E33 = ctx.saved_tensors
    center_E = torch.zeros_like(shift_E)
    grad_u_BHWE, grad_weight_E33, sums_2E = norm_act_depthwise_backward(
        grad_out_BHWE, z_BHWE, scale_E, shift_E, weight_E33, center_E, ctx.act
    )
    grad_z_BHWE = (grad_u_BHWE * scale_E).to(z_BHWE.dtype)
    grad_shift_E, grad_scale_E = sums_2E[0].to(shift_E.dtype), sums_2E[1].to(scale_E.dtype)
    return grad_z_BHWE, grad_scale_E, grad_shift_E, grad_weight_E33.to(weight_E33.dtype), None


norm_act_depthwise.register_autograd(_norm_act_depthwise_backward, setup_context=_keep_for_norm)
