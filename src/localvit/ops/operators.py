"""The depth-wise convolution with the steps around it, each in one pass over the tokens: `torch.ops.localvit`.

`torch.compile` and `torch.export` see each operator as one node. It runs its Triton kernel where
`localvit.ops.dispatch.runs_triton` allows, else the reference, plain torch of the same result
(`localvit.ops.reference`). The operators are opaque (`custom_op`, not `triton_op`), since that choice depends on the
tensors' strides. Maps lie as tokens do, (B, H, W, E) with channels last; they may be views, such as the tokens after
the prefix tokens, and are read where they are.

Shapes: B batch, H and W the grid, E channels.
"""

from typing import Any

import torch
from torch import Tensor

from localvit.ops import reference
from localvit.ops.dispatch import runs_triton


@torch.library.custom_op("localvit::depthwise_act_pool", mutates_args=())
def depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Depth-wise 3x3 convolution, bias, activation, and the sums that a channel gate pools: for inference.

    Stride 1, zeros around the map. A batch norm is folded into the weight and the bias.

    Args:
        x_BHWE: a map in any floating dtype.
        weight_E33: (E, 3, 3) or (E, 1, 3, 3). With channels last (`stride(0) == 1`) the kernel needs no copy of it.
        bias_E: one value per channel.
        act: `hs` (h-swish) or `relu6`.

    Returns:
        The activated map in the dtype of `x_BHWE`, and its sums over positions (B, E), in float32 (float64 for
        float64). Equal inputs give bit-identical results.

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    if runs_triton(x_BHWE):
        from localvit.ops.triton import inference

        return inference.depthwise_act_pool(x_BHWE, weight_E33, bias_E, act)
    y_BHWE, sum_BE = reference.depthwise_act_pool(x_BHWE, weight_E33, bias_E, act)
    return y_BHWE.contiguous(), sum_BE


@depthwise_act_pool.register_fake
def _(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    reference.check(x_BHWE, weight_E33, act, bias=bias_E)
    sum_shape = (x_BHWE.shape[0], x_BHWE.shape[3])
    return x_BHWE.new_empty(x_BHWE.shape), x_BHWE.new_empty(sum_shape, dtype=reference.accumulate_dtype(x_BHWE))


def _save_for_pool(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _depthwise_act_pool_backward(ctx: Any, grad_y_BHWE: Tensor, grad_sum_BE: Tensor) -> tuple:
    x_BHWE, weight_E33, bias_E = ctx.saved_tensors
    grads = reference.depthwise_act_pool_backward(grad_y_BHWE, grad_sum_BE, x_BHWE, weight_E33, bias_E, ctx.act)
    return (*grads, None)


depthwise_act_pool.register_autograd(_depthwise_act_pool_backward, setup_context=_save_for_pool)


@torch.library.custom_op("localvit::norm_act_depthwise", mutates_args=())
def norm_act_depthwise(
    z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor, weight_E33: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`act(z * scale + shift)`, then the depth-wise 3x3 convolution, and its batch statistics: for training.

    A batch norm's normalization is such a scale and shift. Stride 1; the zero padding surrounds the activated map,
    which the kernel never writes to memory. The operator keeps only its arguments for the backward pass.

    Args:
        z_BHWE: a map in any floating dtype, before its normalization.
        scale_E, shift_E: one value per channel, best in float32.
        weight_E33: (E, 3, 3) or (E, 1, 3, 3).
        act: `hs` (h-swish) or `relu6`.

    Returns:
        The convolution's map in the dtype of `z_BHWE`, and its mean and biased variance (`correction=0`) over the batch
        and all positions, each (E,) in float32 (float64 for float64). No gradient flows through mean and variance:
        batch norm's backward formula accounts for them.

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    if runs_triton(z_BHWE):
        from localvit.ops.triton import training

        return training.norm_act_depthwise(z_BHWE, scale_E, shift_E, weight_E33, act)
    out_BHWE, mean_E, variance_E = reference.norm_act_depthwise(z_BHWE, scale_E, shift_E, weight_E33, act)
    return out_BHWE.contiguous(), mean_E, variance_E


@norm_act_depthwise.register_fake
def _(z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor, weight_E33: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    reference.check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E)
    dtype = reference.accumulate_dtype(z_BHWE)
    mean_E, variance_E = (z_BHWE.new_empty(z_BHWE.shape[3], dtype=dtype) for _ in range(2))
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
    """The backward pass of `norm_act_depthwise`, and the sums that the backward pass of the batch norm before it needs.

    With u = z * scale + shift, a batch norm over n values whose mean is `center` has the gradient with respect to z
    scale * (grad_u - sums[0] / n - (z - center) * sums[1] / (n * (variance + eps))), with respect to its weight
    sums[1] / sqrt(variance + eps), and with respect to its bias sums[0].

    Args:
        grad_out_BHWE: the gradient with respect to the convolution's map.
        z_BHWE, scale_E, shift_E, weight_E33, act: the arguments of the forward pass.
        center_E: subtracted from z before the products are summed; its mean, so that no digits are lost.

    Returns:
        The gradient with respect to u (B, H, W, E) in the dtype of `z_BHWE`; in float32 (float64 for float64) that of
        the weight, in its shape, and (2, E): the sums over the batch and all positions of grad_u and of
        grad_u * (z - center).

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    tensors = (grad_out_BHWE, z_BHWE, scale_E, shift_E, weight_E33, center_E)
    if runs_triton(grad_out_BHWE, z_BHWE):
        from localvit.ops.triton import training_backward

        return training_backward.norm_act_depthwise_backward(*tensors, act)
    grad_u_BHWE, grad_weight_E33, sums_2E = reference.norm_act_depthwise_backward(*tensors, act)
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
    reference.check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E, center=center_E)
    reference.check_gradient(grad_out_BHWE, z_BHWE)
    dtype = reference.accumulate_dtype(z_BHWE)
    grad_weight_E33 = z_BHWE.new_empty(weight_E33.shape, dtype=dtype)
    return z_BHWE.new_empty(z_BHWE.shape), grad_weight_E33, z_BHWE.new_empty((2, z_BHWE.shape[3]), dtype=dtype)


def _save_for_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
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


norm_act_depthwise.register_autograd(_norm_act_depthwise_backward, setup_context=_save_for_norm)
