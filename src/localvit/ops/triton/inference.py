"""The Triton kernel of `localvit.ops.reference.depthwise_act_pool`; the tiles are those of `localvit.ops.triton.tiles`.

Roofline for a map of V values of 2 bytes: 4 V bytes, and 25 V operations (9 multiply-adds, bias, 5 for the activation,
one for the sum): 6 operations a byte, below the 20 where an H100's float32 units, and not its memory, would be the
limit. `benchmarks/kernel_instructions.py` counts all instructions, and the time that threads wait for memory.

Shapes: B batch, H and W the grid, E channels, T tiles of one map.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.reference import Shape, accumulate_dtype, check
from localvit.ops.triton.launch import Launch
from localvit.ops.triton.tiles import (
    Area,
    Tiles,
    activate,
    add_row,
    add_taps,
    channel_values,
    check_layout,
    columns_of,
    converted,
    four_columns,
    launch_in_tiles,
    load_four,
    tile_of,
    weight_row,
)

AREA = Area(512)
"""Four pairs of positions per thread."""


def depthwise_act_pool(
    x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str, area: Area = AREA
) -> tuple[Tensor, Tensor]:
    """As `localvit.ops.reference.depthwise_act_pool`, for a non-empty map with channels last.

    By itself, for benchmarks and tests: a module's steps are launched together (`ops.triton.feed_forward`).
    """
    check_layout(x_BHWE)
    tiles, launch = launch_for(x_BHWE.shape, x_BHWE.stride(), x_BHWE.dtype, weight_E33.shape, bias_E.shape, act, area)
    y_BHWE = torch.empty_like(x_BHWE, memory_format=torch.contiguous_format)
    sums_BTE = x_BHWE.new_empty((tiles.batch, tiles.per_image, tiles.channels), dtype=accumulate_dtype(x_BHWE.dtype))
    launch(x_BHWE, weight_E33.contiguous(), bias_E, y_BHWE, sums_BTE)
    return y_BHWE, sums_BTE.sum(1) if tiles.per_image > 1 else sums_BTE.squeeze(1)


@cache
def launch_for(
    shape: Shape, strides: Shape, dtype: torch.dtype, weight: Shape, bias: Shape, act: str, area: Area = AREA
) -> tuple[Tiles, Launch]:
    """Tiles and launch for a map and parameters of some shapes. Raises ValueError as `depthwise_act_pool`."""
    check(shape, weight, bias, act)
    return launch_in_tiles(depthwise_act_pool_kernel, shape, strides, dtype, act, area)


@triton.jit
def depthwise_act_pool_kernel(
    x,
    weight,
    bias,
    y,
    sums,
    height,
    width,
    tile_rows,
    stride_b,
    stride_h,
    E: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HARDSWISH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program's tile of the activated map, and its sums over the tile's positions."""
    tile, image, first, last, even, e = tile_of(height, width, E, tile_rows, BLOCK_P, BLOCK_E)
    inside = e < E
    w00, w01, w02 = weight_row(weight, 0, e, E, ACCUMULATE)
    w10, w11, w12 = weight_row(weight, 1, e, E, ACCUMULATE)
    w20, w21, w22 = weight_row(weight, 2, e, E, ACCUMULATE)
    zeros = tl.zeros((BLOCK_P, BLOCK_E), ACCUMULATE)
    start = zeros + channel_values(bias, e, E, ACCUMULATE)
    x += image * stride_b + (first - 1).to(tl.int64) * stride_h + (even * STRIDE_W + e)
    y += (image * height + first) * width * E + (even * E + e)

    # The row before the tile contributes to its first row; the first row to itself and to the next.
    a, b, c, d = four_columns(x, even, inside, STRIDE_W, columns_of(first - 1, height, width), ACCUMULATE)
    even_sum, odd_sum = add_row(start, start, a, b, c, d, w00, w01, w02)
    x += stride_h
    a, b, c, d = four_columns(x, even, inside, STRIDE_W, width, ACCUMULATE)
    even_sum, odd_sum = add_row(even_sum, odd_sum, a, b, c, d, w10, w11, w12)
    next_even_sum, next_odd_sum = add_row(start, start, a, b, c, d, w00, w01, w02)
    even_pool = zeros
    odd_pool = zeros
    x += stride_h
    end = tl.minimum(last + 1, height)
    ahead = load_four(x, even, inside, STRIDE_W, columns_of(first + 1, end, width))
    x += stride_h
    far_ahead = load_four(x, even, inside, STRIDE_W, columns_of(first + 2, end, width))
    for row in range(first, last):
        a, b, c, d = converted(ahead, ACCUMULATE)
        # Loaded two rows ahead, so that two rows at a time are on their way from memory.
        ahead = far_ahead
        x += stride_h
        far_ahead = load_four(x, even, inside, STRIDE_W, columns_of(row + 3, end, width))
        even_y = activate(add_taps(even_sum, a, b, c, w20, w21, w22), HARDSWISH)
        odd_y = activate(add_taps(odd_sum, b, c, d, w20, w21, w22), HARDSWISH)
        even_sum, odd_sum = add_row(next_even_sum, next_odd_sum, a, b, c, d, w10, w11, w12)
        next_even_sum, next_odd_sum = add_row(start, start, a, b, c, d, w00, w01, w02)
        tl.store(y, even_y, inside & (even < width))
        tl.store(y + E, odd_y, inside & (even + 1 < width))
        even_pool += even_y
        odd_pool += odd_y
        y += width * E
    pool = tl.where(even < width, even_pool, 0.0) + tl.where(even + 1 < width, odd_pool, 0.0)
    tl.store(sums + tile * E + e, tl.sum(pool, 0, keep_dims=True), inside)
