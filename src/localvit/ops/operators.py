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


def run(operator: Any, *arguments: Any) -> Any:
    """An operator's result, without torch's dispatcher where nothing needs it: it takes longer than a launch."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not arguments[0].is_cuda:
        return operator(*arguments)
    return operator._init_fn(*arguments)


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


@torch.library.custom_op("localvit::squeeze_excite", mutates_args=())
def squeeze_excite(
    sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> Tensor:
    """The factors of a squeeze-and-excitation gate with a hard sigmoid, from a map's sums: for inference.

    Args:
        sum_BE: as `depthwise_act_pool` returns them.
        positions: H * W, how many values were summed.
        weight_QE, bias_Q, weight_EQ, bias_E: of the two linear layers, to Q channels and back.

    Returns:
        The factors (B, E) in the dtype of the weights.
    """
    if runs_triton(weight_QE):
        from localvit.ops.triton import squeeze_excite as kernel

        return kernel.squeeze_excite(sum_BE, positions, weight_QE, bias_Q, weight_EQ, bias_E)
    return reference.squeeze_excite(sum_BE, positions, weight_QE, bias_Q, weight_EQ, bias_E)


@squeeze_excite.register_fake
def _(sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor) -> Tensor:
    return weight_EQ.new_empty(sum_BE.shape)


@torch.library.custom_op("localvit::pointwise", mutates_args=())
def pointwise(
    x_BSK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    act: str | None,
    gate_BK: Tensor | None,
    skipped: int,
    num_prefix_tokens: int,
) -> Tensor:
    """1x1 convolution of a map, a gate's factors before it, bias and activation after it: for inference.

    Args:
        x_BSK: the map's positions as rows, in any floating dtype.
        weight_NK: from K to N channels.
        bias_N: one value per output channel, or None.
        act: `hs` (h-swish), `relu6`, or None.
        gate_BK: a factor of each input channel of each image, or None.
        skipped: how many rows of each image, the first, are not of the map.
        num_prefix_tokens: how many rows of zeros to put in front.

    Returns:
        Rows (B, num_prefix_tokens + S - skipped, N) in the dtype of the weight. Equal inputs give bit-identical
        results.

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    if runs_triton(x_BSK):
        from localvit.ops.triton import pointwise as kernel

        return kernel.pointwise(x_BSK, weight_NK, bias_N, act, gate_BK, skipped, num_prefix_tokens)
    return reference.pointwise(x_BSK, weight_NK, bias_N, act, gate_BK, skipped, num_prefix_tokens)


@pointwise.register_fake
def _(
    x_BSK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    act: str | None,
    gate_BK: Tensor | None,
    skipped: int,
    num_prefix_tokens: int,
) -> Tensor:
    reference.check_pointwise(x_BSK, weight_NK, bias_N, act, gate_BK)
    batch, rows, _ = x_BSK.shape
    return weight_NK.new_empty(batch, rows - skipped + num_prefix_tokens, weight_NK.shape[0])


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.inputs = [None if isinstance(each, Tensor) else each for each in inputs]
    ctx.is_tensor = [isinstance(each, Tensor) for each in inputs]
    ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))


def _backward_of(form: Any) -> Any:
    """The backward pass of an operator, by that of its reference."""

    def backward(ctx: Any, grad: Tensor) -> tuple:
        tensors = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        remaining = iter(tensors)
        inputs = [
            next(remaining) if is_tensor else each for each, is_tensor in zip(ctx.inputs, ctx.is_tensor, strict=True)
        ]
        with torch.enable_grad():
            out = form(*inputs)
        found = iter(torch.autograd.grad(out, tensors, grad))
        return tuple(next(found) if is_tensor else None for is_tensor in ctx.is_tensor)

    return backward


pointwise.register_autograd(_backward_of(reference.pointwise), setup_context=_save_inputs)
squeeze_excite.register_autograd(_backward_of(reference.squeeze_excite), setup_context=_save_inputs)
