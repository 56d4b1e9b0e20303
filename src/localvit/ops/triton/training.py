"""The Triton kernel of the depth-wise convolution in training; the tiles are those of `localvit.ops.triton.tiles`.

Roofline for a map of V values of 2 bytes: 4 V bytes, and 40 V operations (18 of the convolution, twice 7 to normalize
and activate, since each value is loaded by two threads, 8 of the statistics): 10 operations a byte, where an H100 has
20 in float32.

Shapes: B batch, H and W the grid, E channels, T tiles of all maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.triton.rows import Statistics
from localvit.ops.triton.tiles import (
    Area,
    activate,
    add_row,
    channel_values,
    check_layout,
    columns_of,
    converted,
    launch_in_tiles,
    load_four,
    tile_of,
    weight_row,
)

AREA = Area(256, num_warps=2)
"""Four pairs of positions per thread: as many as 128 registers hold."""


def norm_act_depthwise(
    z_BHWE: Tensor, norm_4E: Tensor, weight_E33: Tensor, act: str, area: Area = AREA
) -> tuple[Tensor, Statistics]:
    """The depth-wise 3x3 convolution of `act(norm(z))`, with zeros around the activated map, and its statistics.

    Args:
        z_BHWE: a map with channels last, in any floating dtype.
        norm_4E: vectors of `localvit.ops.triton.batch_norm`, in float32 (float64 for float64 maps).
        weight_E33: (E, 3, 3) or (E, 1, 3, 3).
        act: `hs` (h-swish) or `relu6`.

    Returns:
        The convolution's map in the dtype of z, and the statistics of its tiles.
    """
    check_layout(z_BHWE)
    tiles, launch = launch_in_tiles(norm_act_depthwise_kernel, z_BHWE.shape, z_BHWE.stride(), z_BHWE.dtype, act, area)
    out_BHWE = torch.empty_like(z_BHWE, memory_format=torch.contiguous_format)
    statistics = Statistics.empty(tiles.number, tiles.channels, norm_4E)
    launch(z_BHWE, norm_4E, weight_E33.contiguous(), out_BHWE, *statistics)
    return out_BHWE, statistics


@triton.jit
def _activated(four, even, columns, scale, shift, ACCUMULATE: tl.constexpr, HARDSWISH: tl.constexpr):
    """Four columns of the activated map, which is zero outside as well."""
    a, b, c, d = converted(four, ACCUMULATE)
    a = tl.where((even > 0) & (even <= columns), activate(a * scale + shift, HARDSWISH), 0.0)
    b = tl.where(even < columns, activate(b * scale + shift, HARDSWISH), 0.0)
    c = tl.where(even + 1 < columns, activate(c * scale + shift, HARDSWISH), 0.0)
    d = tl.where(even + 2 < columns, activate(d * scale + shift, HARDSWISH), 0.0)
    return a, b, c, d


@triton.jit
def _with_value(mean, squares, value, share):
    """Mean and squared deviations of each column with one value more, which counts for `share` of them.

    This is Welford's algorithm: mean of squares minus squared mean would cancel digits.
    """
    difference = value - mean
    mean += difference * share
    return mean, squares + difference * (value - mean)


@triton.jit
def _of_all_columns(even_mean, odd_mean, even_squares, odd_squares, even, width, rows, number):
    """Mean and squared deviations of a tile, of `number` columns of `rows` values, by Chan's formula."""
    mean = tl.where(even < width, even_mean, 0.0) + tl.where(even + 1 < width, odd_mean, 0.0)
    mean = tl.sum(mean, 0, keep_dims=True) / number
    even_squares += rows * (even_mean - mean) * (even_mean - mean)
    odd_squares += rows * (odd_mean - mean) * (odd_mean - mean)
    square = tl.where(even < width, even_squares, 0.0) + tl.where(even + 1 < width, odd_squares, 0.0)
    return mean, tl.sum(square, 0, keep_dims=True)


@triton.jit
def norm_act_depthwise_kernel(
    z,
    norm,
    weight,
    out,
    counts,
    means,
    squares,
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
    """One program's tile of the convolution's map, and its number of positions, means and squared deviations."""
    tile, image, first, last, even, e = tile_of(height, width, E, tile_rows, BLOCK_P, BLOCK_E)
    inside = e < E
    s = channel_values(norm + 2 * E, e, E, ACCUMULATE)
    t = channel_values(norm + 3 * E, e, E, ACCUMULATE)
    w00, w01, w02 = weight_row(weight, 0, e, E, ACCUMULATE)
    w10, w11, w12 = weight_row(weight, 1, e, E, ACCUMULATE)
    w20, w21, w22 = weight_row(weight, 2, e, E, ACCUMULATE)
    zeros = tl.zeros((BLOCK_P, BLOCK_E), ACCUMULATE)
    z += image * stride_b + (first - 1).to(tl.int64) * stride_h + (even * STRIDE_W + e)
    out += (image * height + first) * width * E + (even * E + e)

    columns = columns_of(first - 1, height, width)
    four = load_four(z, even, inside, STRIDE_W, columns)
    a, b, c, d = _activated(four, even, columns, s, t, ACCUMULATE, HARDSWISH)
    even_sum, odd_sum = add_row(zeros, zeros, a, b, c, d, w00, w01, w02)
    z += stride_h
    four = load_four(z, even, inside, STRIDE_W, width)
    a, b, c, d = _activated(four, even, width, s, t, ACCUMULATE, HARDSWISH)
    even_sum, odd_sum = add_row(even_sum, odd_sum, a, b, c, d, w10, w11, w12)
    next_even_sum, next_odd_sum = add_row(zeros, zeros, a, b, c, d, w00, w01, w02)
    even_mean = zeros
    odd_mean = zeros
    even_squares = zeros
    odd_squares = zeros
    z += stride_h
    end = tl.minimum(last + 1, height)
    ahead = load_four(z, even, inside, STRIDE_W, columns_of(first + 1, end, width))
    z += stride_h
    far_ahead = load_four(z, even, inside, STRIDE_W, columns_of(first + 2, end, width))
    for row in range(first, last):
        columns = columns_of(row + 1, height, width)
        a, b, c, d = _activated(ahead, even, columns, s, t, ACCUMULATE, HARDSWISH)
        # Loaded two rows ahead, so that two rows at a time are on their way from memory.
        ahead = far_ahead
        z += stride_h
        far_ahead = load_four(z, even, inside, STRIDE_W, columns_of(row + 3, end, width))
        even_out, odd_out = add_row(even_sum, odd_sum, a, b, c, d, w20, w21, w22)
        even_sum, odd_sum = add_row(next_even_sum, next_odd_sum, a, b, c, d, w10, w11, w12)
        next_even_sum, next_odd_sum = add_row(zeros, zeros, a, b, c, d, w00, w01, w02)
        tl.store(out, even_out, inside & (even < width))
        tl.store(out + E, odd_out, inside & (even + 1 < width))
        out += width * E
        share = 1.0 / (row + 1 - first).to(ACCUMULATE)
        even_mean, even_squares = _with_value(even_mean, even_squares, even_out, share)
        odd_mean, odd_squares = _with_value(odd_mean, odd_squares, odd_out, share)
    rows = (last - first).to(ACCUMULATE)
    number = tl.sum((even < width).to(ACCUMULATE) + (even + 1 < width).to(ACCUMULATE), 0, keep_dims=True)
    mean, square = _of_all_columns(even_mean, odd_mean, even_squares, odd_squares, even, width, rows, number)
    tl.store(means + tile * E + e, mean, inside)
    tl.store(squares + tile * E + e, square, inside)
    tl.store(counts + tile + tl.zeros_like(e), rows * number, e == 0)
