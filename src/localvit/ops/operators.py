"""The steps of a fused locality module that have Triton kernels, as operators: `torch.ops.localvit`.

`torch.compile` and `torch.export` see each as one node. It runs its kernel where `localvit.ops.dispatch.runs_triton`
allows, else the reference, plain torch of the same result (`localvit.ops.reference`). The operators have no gradients:
`Operator.run` takes care of these. They are registered by hand, since `torch.library.custom_op` adds steps to each call
that take longer than the kernels.

Shapes: B batch, H and W the grid, E channels, Q channels of a gate's bottleneck, S rows of an image, K and N channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from localvit.ops import reference
from localvit.ops.dispatch import runs_directly, runs_triton

LIBRARY = torch.library.Library("localvit", "FRAGMENT")


def register(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of a function's name and annotations that changes no argument; `fake` returns empty results."""
    name = function.__name__
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"localvit::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.localvit, name).default


class Operator:
    """An operator, called as a function. `run` also gives gradients, and costs less where no tracer looks.

    Args:
        function: computes it, by its kernel or by its reference; its name and annotations are the operator's.
        form: its reference.
        fake: returns empty tensors of its results' shapes and dtypes.
    """

    def __init__(self, function: Callable[..., Any], form: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self.function, self.form = function, form
        self._registered = register(function, fake)

    def __call__(self, *arguments: Any) -> Any:
        return self._registered(*arguments)

    def run(self, *arguments: Any) -> Any:
        """The operator's result; where a gradient is wanted, with that of the reference."""
        direct = runs_directly(arguments[0])
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
            return _WithGradientOfReference.apply(self, *arguments) if direct else self.form(*arguments)
        return self.function(*arguments) if direct else self(*arguments)


class _WithGradientOfReference(torch.autograd.Function):
    """An operator whose backward pass computes its reference again."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> Any:
        ctx.operator = operator
        ctx.others = [None if isinstance(each, Tensor) else each for each in arguments]
        ctx.is_tensor = [isinstance(each, Tensor) for each in arguments]
        ctx.save_for_backward(*(each for each in arguments if isinstance(each, Tensor)))
        return operator.function(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        tensors = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        remaining = iter(tensors)
        pairs = zip(ctx.others, ctx.is_tensor, strict=True)
        arguments = [next(remaining) if is_tensor else other for other, is_tensor in pairs]
        with torch.enable_grad():
            results = ctx.operator.form(*arguments)
        found = iter(torch.autograd.grad(results, tensors, gradients))
        return None, *(next(found) if is_tensor else None for is_tensor in ctx.is_tensor)


def _depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    x_shape = x_BHWE.shape
    reference.check(x_shape, weight_E33.shape, bias_E.shape, act)
    sums_BE = x_BHWE.new_empty((x_shape[0], x_shape[3]), dtype=reference.accumulate_dtype(x_BHWE))
    return x_BHWE.new_empty(x_shape), sums_BE


def depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Depth-wise 3x3 convolution, bias, activation, and the sums that a channel gate pools.

    Stride 1, zeros around the map. A batch norm is folded into the weight and the bias.

    Args:
        x_BHWE: a map in any floating dtype, possibly a view, such as the tokens after the prefix tokens.
        weight_E33: (E, 3, 3) or (E, 1, 3, 3).
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


def _squeeze_excite(
    sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> Tensor:
    return weight_EQ.new_empty(sum_BE.shape)


def squeeze_excite(
    sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> Tensor:
    """The factors of a squeeze-and-excitation gate with a hard sigmoid, from a map's sums.

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


def _pointwise(
    x_BSK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    act: str | None,
    gate_BK: Tensor | None,
    skipped: int,
    num_prefix_tokens: int,
) -> Tensor:
    shape_of = reference.shape_of
    reference.check_pointwise(x_BSK.shape, weight_NK.shape, shape_of(bias_N), act, shape_of(gate_BK))
    batch, rows, _ = x_BSK.shape
    return weight_NK.new_empty(batch, rows - skipped + num_prefix_tokens, weight_NK.shape[0])


def pointwise(
    x_BSK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    act: str | None,
    gate_BK: Tensor | None,
    skipped: int,
    num_prefix_tokens: int,
) -> Tensor:
    """1x1 convolution of a map, a gate's factors before it, bias and activation after it.

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


DEPTHWISE_ACT_POOL = Operator(depthwise_act_pool, reference.depthwise_act_pool, _depthwise_act_pool)
SQUEEZE_EXCITE = Operator(squeeze_excite, reference.squeeze_excite, _squeeze_excite)
POINTWISE = Operator(pointwise, reference.pointwise, _pointwise)
