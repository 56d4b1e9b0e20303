"""A fused locality module as one operator, `torch.ops.localvit.feed_forward`, which has Triton kernels.

`torch.compile` and `torch.export` see one node for a module. It runs its kernels where
`localvit.ops.dispatch.runs_triton` allows, else its reference, plain torch of the same result
(`localvit.ops.reference`). It has no gradients: `run` takes care of these. It is registered by hand, since
`torch.library.custom_op` adds steps to each call that take longer than the kernels.

Shapes: B batch, N tokens (prefix tokens first), C channels outside, H and W the grid.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


def feed_forward(
    x_BNC: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    parameters: list[Tensor],
    act1: str,
    act2: str,
    gate: str | None,
) -> Tensor:
    """What a locality module adds to its tokens: zero for prefix tokens, its convolutions for the others.

    Args:
        x_BNC: (B, num_prefix_tokens + height * width, C) in any floating dtype.
        parameters: those of `reference.Folded`, and those of the gate.
        act1, act2: `hs` (h-swish) or `relu6`, after the expansion and after the depth-wise convolution.
        gate: the channel gate after them: `se`, `eca` or `ecah` (`localvit.locality.ACTS`), or None.

    Returns:
        Tokens (B, N, C) in the dtype of the projection. Equal inputs give bit-identical results.

    Raises:
        ValueError: for an unknown activation or gate, or shapes that do not fit.
    """
    given = x_BNC, height, width, num_prefix_tokens, parameters, act1, act2, gate
    if runs_triton(x_BNC):
        from localvit.ops.triton import feed_forward as kernels

        return kernels.feed_forward(*given)
    return reference.feed_forward(*given)


def _empty(
    x_BNC: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    parameters: list[Tensor],
    act1: str,
    act2: str,
    gate: str | None,
) -> Tensor:
    folded, _ = reference.split(parameters)
    reference.check_feed_forward(x_BNC.shape, height, width, num_prefix_tokens, folded, (act1, act2), gate)
    return folded.projection.new_empty(*x_BNC.shape[:2], len(folded.projection))


_registered = register(feed_forward, _empty)


class Module(NamedTuple):
    """What `feed_forward` has to know of a fused module."""

    parameters: list[Tensor]
    act1: str
    act2: str
    gate: str | None


def run(x_BNC: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int, module: Module) -> Tensor:
    """The operator's result; where a gradient is wanted, with that of the reference. Costs less where no tracer looks.

    Args:
        x_BNC, num_prefix_tokens: as in `feed_forward`.
        grid_size: height and width.
        module: what else `feed_forward` takes.
    """
    height, width = grid_size
    direct = runs_directly(x_BNC)
    if torch.is_grad_enabled() and (x_BNC.requires_grad or any(each.requires_grad for each in module.parameters)):
        if direct:
            return _WithGradientOfReference.apply((height, width, num_prefix_tokens), module[1:], x_BNC, *module[0])
        return reference.feed_forward(x_BNC, height, width, num_prefix_tokens, *module)
    form = feed_forward if direct else _registered
    return form(x_BNC, height, width, num_prefix_tokens, *module)


class _WithGradientOfReference(torch.autograd.Function):
    """The operator, whose backward pass computes its reference again."""

    @staticmethod
    def forward(
        ctx: Any, sizes: tuple[int, int, int], names: tuple[str, str, str | None], x_BNC: Tensor, *parameters: Tensor
    ) -> Any:
        ctx.sizes, ctx.names = sizes, names
        ctx.save_for_backward(x_BNC, *parameters)
        height, width, num_prefix_tokens = sizes
        return feed_forward(x_BNC, height, width, num_prefix_tokens, list(parameters), *names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Any, ...]:
        tensors = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        x_BNC, *parameters = tensors
        act1, act2, gate = ctx.names
        height, width, num_prefix_tokens = ctx.sizes
        with torch.enable_grad():
            out_BNC = reference.feed_forward(x_BNC, height, width, num_prefix_tokens, parameters, act1, act2, gate)
        return None, None, *torch.autograd.grad(out_BNC, tensors, grad_BNC)
