"""A fused locality module by its four kernels: expansion, depth-wise convolution, gate, projection.

What does not change from call to call, the launches and the shapes of their results, is made once for tokens of one
shape: looking it up kernel by kernel takes as long on the host as launching.

Shapes: B batch, N tokens (prefix tokens first), C channels outside, H and W the grid, E hidden channels, T tiles of one
map.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from localvit.ops.kernel_gates import KNOWN
from localvit.ops.operands import operands
from localvit.ops.reference import Folded, Shape, accumulate_dtype, check_tokens
from localvit.ops.triton import inference, pointwise
from localvit.ops.triton.launch import Launch


def feed_forward(
    x_BNC: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    parameters: Sequence[Tensor],
    act1: str,
    act2: str,
    gate: str | None,
) -> Tensor:
    """As `localvit.ops.operators.feed_forward`, for tokens in bfloat16 or float16."""
    if x_BNC.stride(2) != 1:
        x_BNC = x_BNC.contiguous()
    device = x_BNC.get_device()
    parameters = operands(parameters, device)
    expansion, bias1_E, depthwise, bias2_E, projection, bias3_C, *gate_parameters = parameters
    steps = _steps(
        *(x_BNC.shape, x_BNC.stride(), height, width, num_prefix_tokens, act1, act2, gate is not None),
        *(expansion.dtype, device, *[each.shape for each in parameters[: len(Folded._fields)]]),
    )
    hidden_BHWE = expansion.new_empty(steps.map_BHWE)
    steps.expansion(x_BNC, expansion, None, None, bias1_E, hidden_BHWE, None, None, None)
    x_BHWE = torch.empty_like(hidden_BHWE)
    sum_BE = expansion.new_empty(steps.sums, dtype=steps.sums_dtype)
    steps.depthwise(hidden_BHWE, depthwise, bias2_E, x_BHWE, sum_BE)
    gate_BE = None
    if gate is not None:
        sum_BE = sum_BE if sum_BE.dim() == 2 else sum_BE.sum(1)
        gate_BE = KNOWN[gate].factors(sum_BE, height * width, gate_parameters).contiguous()
    out_BNC = projection.new_empty(steps.out_BNC)
    steps.projection(x_BHWE, projection, None, gate_BE, bias3_C, out_BNC, None, None, None)
    return out_BNC


class _Steps(NamedTuple):
    """The launches of a module's convolutions, and what they write."""

    expansion: Launch
    depthwise: Launch
    projection: Launch
    map_BHWE: Shape
    sums: Shape
    """(B, T, E), or (B, E) where a map is one tile."""
    sums_dtype: torch.dtype
    out_BNC: Shape


@cache
def _steps(
    tokens: Shape,
    strides: Shape,
    height: int,
    width: int,
    num_prefix_tokens: int,
    act1: str,
    act2: str,
    gated: bool,
    dtype: torch.dtype,
    device: int,
    *folded: Shape,
) -> _Steps:
    check_tokens(tokens, height, width, num_prefix_tokens)
    expansion, bias1_E, depthwise, bias2_E, projection, bias3_C = folded
    batch, hidden, positions = tokens[0], expansion[0], height * width
    map_BHWE = batch, height, width, hidden
    map_strides = positions * hidden, width * hidden, hidden, 1
    tiles, depthwise_launch = inference.launch_for(map_BHWE, map_strides, dtype, depthwise, bias2_E, act2)
    rows_BSE, row_strides = (batch, positions, hidden), (positions * hidden, hidden, 1)
    return _Steps(
        expansion=pointwise.launch_for(
            *(tokens, strides, expansion, bias1_E),
            gate=None,
            skipped=num_prefix_tokens,
            num_prefix_tokens=0,
            norm_act=None,
            act=act1,
            blocks=None,
            device=device,
        ),
        depthwise=depthwise_launch,
        projection=pointwise.launch_for(
            *(rows_BSE, row_strides, projection, bias3_C),
            gate=(batch, hidden) if gated else None,
            skipped=0,
            num_prefix_tokens=num_prefix_tokens,
            norm_act=None,
            act=None,
            blocks=None,
            device=device,
        ),
        map_BHWE=map_BHWE,
        sums=(batch, hidden) if tiles.per_image == 1 else (batch, tiles.per_image, hidden),
        sums_dtype=accumulate_dtype(dtype),
        out_BNC=(*tokens[:2], projection[0]),
    )
