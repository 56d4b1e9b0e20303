"""The Triton kernel of `ops.operators.norm_act_depthwise_backward`, with the tiles of `ops.triton.tiles`.

Shapes: B batch, H and W the grid, E channels, T tiles of all maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.reference import accumulate_dtype, check, check_gradient
from localvit.ops.triton.tiles import (
    LAUNCH,
    Tiles,
    activate,
    activation_slope,
    add_taps,
    channel_values,
    check_layout,
    columns_of,
    four_columns,
    tile_of,
    two_columns,
    weight_row,
    weight_rows,
)

TILE_AREA = 256
"""Two pairs of positions per thread, since more partial sums are live: four would need 204 registers."""


def norm_act_depthwise_backward(
    grad_out_BHWE: Tensor,
    z_BHWE: Tensor,
    scale_E: Tensor,
    shift_E: Tensor,
    weight_E33: Tensor,
    center_E: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `localvit.ops.operators.norm_act_depthwise_backward`, for non-empty maps with channels last."""
    check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E, center=center_E)
    check_gradient(grad_out_BHWE, z_BHWE)
    check_layout(grad_out_BHWE, z_BHWE)
    tiles, dtype = Tiles(TILE_AREA, *z_BHWE.shape), accumulate_dtype(z_BHWE)
    grad_u_BHWE = z_BHWE.new_empty(z_BHWE.shape)
    weight_sums_T9E = z_BHWE.new_empty((tiles.number, 9, tiles.channels), dtype=dtype)
    sums_T2E = z_BHWE.new_empty((tiles.number, 2, tiles.channels), dtype=dtype)
    with torch.cuda.device_of(z_BHWE):
        norm_act_depthwise_backward_kernel[tiles.grid](
            grad_out_BHWE,
            z_BHWE,
            scale_E.contiguous(),
            shift_E.contiguous(),
            weight_rows(weight_E33),
            center_E.contiguous(),
            grad_u_BHWE,
            weight_sums_T9E,
            sums_T2E,
            *tiles.sizes,
            *z_BHWE.stride()[:3],
            *grad_out_BHWE.stride()[:3],
            **tiles.constants(z_BHWE, act),
            **LAUNCH,
        )
    grad_weight_E33 = weight_sums_T9E.sum(0).t().reshape(weight_E33.shape).contiguous()
    return grad_u_BHWE, grad_weight_E33, sums_T2E.sum(0)


@triton.jit
def _two_activated(
    pointers, even, inside, stride_w, columns, scale, shift, ACCUMULATE: tl.constexpr, HARDSWISH: tl.constexpr
):
    """`two_columns` of the activated map, which is zero outside as well."""
    at_even, at_odd = two_columns(pointers, even, inside, stride_w, columns, ACCUMULATE)
    at_even = tl.where(even < columns, activate(at_even * scale + shift, HARDSWISH), 0.0)
    at_odd = tl.where(even + 1 < columns, activate(at_odd * scale + shift, HARDSWISH), 0.0)
    return at_even, at_odd


@triton.jit
def _add_products(left_sum, center_sum, right_sum, a, b, c, d, at_even, at_odd):
    """Add to a row of the weight's gradient the products of a row (a, b, c, d) of the output's gradient."""
    left_sum += c * at_even
    left_sum += d * at_odd
    center_sum += b * at_even
    center_sum += c * at_odd
    right_sum += a * at_even
    right_sum += b * at_odd
    return left_sum, center_sum, right_sum


@triton.jit
def _store_total(pointers, total, inside):
    tl.store(pointers, tl.sum(total, 0, keep_dims=True), inside)


@triton.jit
def norm_act_depthwise_backward_kernel(
    grad_out,
    z,
    scale,
    shift,
    weight,
    center,
    grad_u,
    weight_sums,
    sums,
    height,
    width,
    channels,
    tile_rows,
    stride_b,
    stride_h,
    stride_w,
    grad_stride_b,
    grad_stride_h,
    grad_stride_w,
    ACCUMULATE: tl.constexpr,
    HARDSWISH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program's tile of the gradient of u, and its part of the weight's gradient and of the sums."""
    tile, image, first, last, even, e = tile_of(height, width, channels, tile_rows, BLOCK_P, BLOCK_E)
    inside = e < channels
    s = channel_values(scale, e, channels, ACCUMULATE)
    t = channel_values(shift, e, channels, ACCUMULATE)
    m = channel_values(center, e, channels, ACCUMULATE)
    # The weight rotated by 180 degrees: the gradient flows back from where each input contributed.
    w22, w21, w20 = weight_row(weight, 0, e, channels, ACCUMULATE)
    w12, w11, w10 = weight_row(weight, 1, e, channels, ACCUMULATE)
    w02, w01, w00 = weight_row(weight, 2, e, channels, ACCUMULATE)
    zeros = tl.zeros((BLOCK_P, BLOCK_E), ACCUMULATE)
    z += image * stride_b + first.to(tl.int64) * stride_h + (even * stride_w + e)
    grad_out += image * grad_stride_b + (first - 1).to(tl.int64) * grad_stride_h + (even * grad_stride_w + e)
    grad_u += (image * height + first) * width * channels + (even * channels + e)

    # For each row of the gradient, the tile's activated rows above, at and below it.
    even_below, odd_below = _two_activated(z, even, inside, stride_w, width, s, t, ACCUMULATE, HARDSWISH)
    columns = columns_of(first - 1, height, width)
    a, b, c, d = four_columns(grad_out, even, inside, grad_stride_w, columns, ACCUMULATE)
    even_sum = add_taps(zeros, a, b, c, w00, w01, w02)
    odd_sum = add_taps(zeros, b, c, d, w00, w01, w02)
    sum20, sum21, sum22 = _add_products(zeros, zeros, zeros, a, b, c, d, even_below, odd_below)
    even_here = even_below
    odd_here = odd_below
    columns = columns_of(first + 1, last, width)
    even_below, odd_below = _two_activated(z + stride_h, even, inside, stride_w, columns, s, t, ACCUMULATE, HARDSWISH)
    grad_out += grad_stride_h
    a, b, c, d = four_columns(grad_out, even, inside, grad_stride_w, width, ACCUMULATE)
    even_sum = add_taps(even_sum, a, b, c, w10, w11, w12)
    odd_sum = add_taps(odd_sum, b, c, d, w10, w11, w12)
    next_even_sum = add_taps(zeros, a, b, c, w00, w01, w02)
    next_odd_sum = add_taps(zeros, b, c, d, w00, w01, w02)
    sum10, sum11, sum12 = _add_products(zeros, zeros, zeros, a, b, c, d, even_here, odd_here)
    sum20, sum21, sum22 = _add_products(sum20, sum21, sum22, a, b, c, d, even_below, odd_below)
    sum00 = zeros
    sum01 = zeros
    sum02 = zeros
    total = zeros
    total_z = zeros
    for row in range(first, last):
        even_above = even_here
        odd_above = odd_here
        even_here = even_below
        odd_here = odd_below
        columns = columns_of(row + 2, last, width)
        even_below, odd_below = _two_activated(
            z + 2 * stride_h, even, inside, stride_w, columns, s, t, ACCUMULATE, HARDSWISH
        )
        grad_out += grad_stride_h
        columns = columns_of(row + 1, height, width)
        a, b, c, d = four_columns(grad_out, even, inside, grad_stride_w, columns, ACCUMULATE)
        even_grad = add_taps(even_sum, a, b, c, w20, w21, w22)
        odd_grad = add_taps(odd_sum, b, c, d, w20, w21, w22)
        even_sum = add_taps(next_even_sum, a, b, c, w10, w11, w12)
        odd_sum = add_taps(next_odd_sum, b, c, d, w10, w11, w12)
        next_even_sum = add_taps(zeros, a, b, c, w00, w01, w02)
        next_odd_sum = add_taps(zeros, b, c, d, w00, w01, w02)
        sum00, sum01, sum02 = _add_products(sum00, sum01, sum02, a, b, c, d, even_above, odd_above)
        sum10, sum11, sum12 = _add_products(sum10, sum11, sum12, a, b, c, d, even_here, odd_here)
        sum20, sum21, sum22 = _add_products(sum20, sum21, sum22, a, b, c, d, even_below, odd_below)
        # Loaded again from the L1 cache: keeping it for two rows would take registers.
        even_z, odd_z = two_columns(z, even, inside, stride_w, width, ACCUMULATE)
        even_grad *= activation_slope(even_z * s + t, HARDSWISH)
        odd_grad *= activation_slope(odd_z * s + t, HARDSWISH)
        tl.store(grad_u, even_grad, inside & (even < width))
        tl.store(grad_u + channels, odd_grad, inside & (even + 1 < width))
        even_grad = tl.where(even < width, even_grad, 0.0)
        odd_grad = tl.where(even + 1 < width, odd_grad, 0.0)
        total += even_grad
        total += odd_grad
        total_z += even_grad * (even_z - m)
        total_z += odd_grad * (odd_z - m)
        z += stride_h
        grad_u += width * channels
    weight_sums += tile * 9 * channels + e
    _store_total(weight_sums, sum00, inside)
    _store_total(weight_sums + channels, sum01, inside)
    _store_total(weight_sums + 2 * channels, sum02, inside)
    _store_total(weight_sums + 3 * channels, sum10, inside)
    _store_total(weight_sums + 4 * channels, sum11, inside)
    _store_total(weight_sums + 5 * channels, sum12, inside)
    _store_total(weight_sums + 6 * channels, sum20, inside)
    _store_total(weight_sums + 7 * channels, sum21, inside)
    _store_total(weight_sums + 8 * channels, sum22, inside)
    sums += tile * 2 * channels + e
    _store_total(sums, total, inside)
    _store_total(sums + channels, total_z, inside)
