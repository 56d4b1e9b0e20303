"""The Triton kernel of `localvit.ops.operators.norm_act_depthwise`; the tiles are those of `localvit.ops.triton.tiles`.

Shapes: B batch, H and W the grid, E channels, T tiles of all maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.reference import accumulate_dtype, check
from localvit.ops.triton.tiles import (
    LAUNCH,
    Tiles,
    activate,
    add_taps,
    channel_values,
    check_layout,
    columns_of,
    four_columns,
    tile_of,
    weight_row,
    weight_rows,
)

TILE_AREA = 512
"""Four pairs of positions per thread: as many as 128 registers hold."""


def norm_act_depthwise(
    z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor, weight_E33: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `localvit.ops.operators.norm_act_depthwise`, for a non-empty map with channels last."""
    check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E)
    check_layout(z_BHWE)
    tiles, dtype = Tiles(TILE_AREA, *z_BHWE.shape), accumulate_dtype(z_BHWE)
    out_BHWE = z_BHWE.new_empty(z_BHWE.shape)
    counts_T1 = z_BHWE.new_empty((tiles.number, 1), dtype=dtype)
    means_TE = z_BHWE.new_empty((tiles.number, tiles.channels), dtype=dtype)
    squares_TE = z_BHWE.new_empty((tiles.number, tiles.channels), dtype=dtype)
    with torch.cuda.device_of(z_BHWE):
        norm_act_depthwise_kernel[tiles.grid](
            z_BHWE,
            scale_E.contiguous(),
            shift_E.contiguous(),
            weight_rows(weight_E33),
            out_BHWE,
            counts_T1,
            means_TE,
            squares_TE,
            *tiles.sizes,
            *z_BHWE.stride()[:3],
            **tiles.constants(z_BHWE, act),
            **LAUNCH,
        )
    # Chan's formula: squared deviations from each tile's mean, plus those of the tiles' means from the overall mean.
    count = counts_T1.sum()
    mean_E = (counts_T1 * means_TE).sum(0) / count
    return out_BHWE, mean_E, (squares_TE + counts_T1 * (means_TE - mean_E).square()).sum(0) / count


@triton.jit
def _four_activated(
    pointers, even, inside, stride_w, columns, scale, shift, ACCUMULATE: tl.constexpr, HARDSWISH: tl.constexpr
):
    """`four_columns` of the activated map, which is zero outside as well."""
    before, at_even, at_odd, after = four_columns(pointers, even, inside, stride_w, columns, ACCUMULATE)
    before = tl.where((even > 0) & (even <= columns), activate(before * scale + shift, HARDSWISH), 0.0)
    at_even = tl.where(even < columns, activate(at_even * scale + shift, HARDSWISH), 0.0)
    at_odd = tl.where(even + 1 < columns, activate(at_odd * scale + shift, HARDSWISH), 0.0)
    after = tl.where(even + 2 < columns, activate(after * scale + shift, HARDSWISH), 0.0)
    return before, at_even, at_odd, after


@triton.jit
def norm_act_depthwise_kernel(
    z,
    scale,
    shift,
    weight,
    out,
    counts,
    means,
    squares,
    height,
    width,
    channels,
    tile_rows,
    stride_b,
    stride_h,
    stride_w,
    ACCUMULATE: tl.constexpr,
    HARDSWISH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program's tile of the convolution's map, and its number of positions, means and squared deviations."""
    tile, image, first, last, even, e = tile_of(height, width, channels, tile_rows, BLOCK_P, BLOCK_E)
    inside = e < channels
    s = channel_values(scale, e, channels, ACCUMULATE)
    t = channel_values(shift, e, channels, ACCUMULATE)
    w00, w01, w02 = weight_row(weight, 0, e, channels, ACCUMULATE)
    w10, w11, w12 = weight_row(weight, 1, e, channels, ACCUMULATE)
    w20, w21, w22 = weight_row(weight, 2, e, channels, ACCUMULATE)
    zeros = tl.zeros((BLOCK_P, BLOCK_E), ACCUMULATE)
    z += image * stride_b + (first - 1).to(tl.int64) * stride_h + (even * stride_w + e)
    out += (image * height + first) * width * channels + (even * channels + e)

    columns = columns_of(first - 1, height, width)
    a, b, c, d = _four_activated(z, even, inside, stride_w, columns, s, t, ACCUMULATE, HARDSWISH)
    even_sum = add_taps(zeros, a, b, c, w00, w01, w02)
    odd_sum = add_taps(zeros, b, c, d, w00, w01, w02)
    z += stride_h
    a, b, c, d = _four_activated(z, even, inside, stride_w, width, s, t, ACCUMULATE, HARDSWISH)
    even_sum = add_taps(even_sum, a, b, c, w10, w11, w12)
    odd_sum = add_taps(odd_sum, b, c, d, w10, w11, w12)
    next_even_sum = add_taps(zeros, a, b, c, w00, w01, w02)
    next_odd_sum = add_taps(zeros, b, c, d, w00, w01, w02)
    even_mean = zeros
    odd_mean = zeros
    even_squares = zeros
    odd_squares = zeros
    for row in range(first, last):
        z += stride_h
        columns = columns_of(row + 1, height, width)
        a, b, c, d = _four_activated(z, even, inside, stride_w, columns, s, t, ACCUMULATE, HARDSWISH)
        even_out = add_taps(even_sum, a, b, c, w20, w21, w22)
        odd_out = add_taps(odd_sum, b, c, d, w20, w21, w22)
        even_sum = add_taps(next_even_sum, a, b, c, w10, w11, w12)
        odd_sum = add_taps(next_odd_sum, b, c, d, w10, w11, w12)
        next_even_sum = add_taps(zeros, a, b, c, w00, w01, w02)
        next_odd_sum = add_taps(zeros, b, c, d, w00, w01, w02)
        tl.store(out, even_out, inside & (even < width))
        tl.store(out + channels, odd_out, inside & (even + 1 < width))
        out += width * channels
        # Welford's algorithm, column by column: mean of squares minus squared mean would cancel digits.
        share = 1.0 / (row + 1 - first).to(ACCUMULATE)
        difference = even_out - even_mean
        even_mean += difference * share
        even_squares += difference * (even_out - even_mean)
        difference = odd_out - odd_mean
        odd_mean += difference * share
        odd_squares += difference * (odd_out - odd_mean)
    # Chan's formula for the columns of the tile, which have equally many rows.
    rows = (last - first).to(ACCUMULATE)
    number = tl.sum((even < width).to(ACCUMULATE) + (even + 1 < width).to(ACCUMULATE), 0, keep_dims=True)
    mean = tl.where(even < width, even_mean, 0.0) + tl.where(even + 1 < width, odd_mean, 0.0)
    mean = tl.sum(mean, 0, keep_dims=True) / number
    even_squares += rows * (even_mean - mean) * (even_mean - mean)
    odd_squares += rows * (odd_mean - mean) * (odd_mean - mean)
    square = tl.where(even < width, even_squares, 0.0) + tl.where(even + 1 < width, odd_squares, 0.0)
    tl.store(means + tile * channels + e, mean, inside)
    tl.store(squares + tile * channels + e, tl.sum(square, 0, keep_dims=True), inside)
    tl.store(counts + tile + tl.zeros_like(e), rows * number, e == 0)
