"""The Triton kernel of the backward pass of `ops.triton.training`, with the tiles of `ops.triton.tiles`.

Roofline for a map of V values of 2 bytes: 8 V bytes (three maps are read, one is written), and 65 V operations (18 for
the gradient of the input and 18 for that of the weight, twice 4 through the norm, 7 to normalize and activate, 7 for
the slope, 7 of the sums): 8 operations a byte, where an H100 has 20 in float32.

Shapes: B batch, H and W the grid, E channels, T tiles of all maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.triton.tiles import (
    Area,
    activate,
    activation_slope,
    add_row,
    channel_values,
    check_layout,
    columns_of,
    launch_in_tiles,
    load_four,
    load_two,
    tile_of,
    weight_row,
)

AREA = Area(256)
"""Two pairs of positions per thread, since more partial sums are live: four would need 204 registers."""


def norm_act_depthwise_backward(
    grad_BHWE: Tensor,
    out_BHWE: Tensor,
    out_norm_4E: Tensor,
    slopes_3E: Tensor,
    z_BHWE: Tensor,
    norm_4E: Tensor,
    weight_E33: Tensor,
    act: str,
    area: Area = AREA,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the batch norm after `norm_act_depthwise`, the convolution, and the activation.

    Args:
        grad_BHWE: the gradient of the output of the batch norm that normalizes the convolution's map.
        out_BHWE: the convolution's map.
        out_norm_4E, slopes_3E: that batch norm's vectors, and the slopes of its backward pass.
        z_BHWE, norm_4E, weight_E33, act: the arguments of the forward pass.

    Returns:
        The gradient of norm(z) in z's shape and dtype, that of the weight in the shape (E, 3, 3) and the dtype of
        `norm_4E`, and (T, 2, E): the sums over each tile of the first, and of it times (z - mean).
    """
    check_layout(grad_BHWE, out_BHWE, z_BHWE)
    tiles, launch = launch_in_tiles(
        norm_act_depthwise_backward_kernel, z_BHWE.shape, z_BHWE.stride(), z_BHWE.dtype, act, area
    )
    grad_u_BHWE = torch.empty_like(z_BHWE, memory_format=torch.contiguous_format)
    weight_sums_T9E = norm_4E.new_empty((tiles.number, 9, tiles.channels))
    sums_T2E = norm_4E.new_empty((tiles.number, 2, tiles.channels))
    launch(
        *(grad_BHWE, out_BHWE, out_norm_4E, slopes_3E, z_BHWE, norm_4E, weight_E33.contiguous()),
        *(grad_u_BHWE, weight_sums_T9E, sums_T2E),
    )
    return grad_u_BHWE, weight_sums_T9E.sum(0).t().reshape(-1, 3, 3), sums_T2E


@triton.jit
def _two_activated(two, even, columns, scale, shift, ACCUMULATE: tl.constexpr, HARDSWISH: tl.constexpr):
    """Two columns of the activated map, which is zero outside as well."""
    at_even = tl.where(even < columns, activate(two[0].to(ACCUMULATE) * scale + shift, HARDSWISH), 0.0)
    at_odd = tl.where(even + 1 < columns, activate(two[1].to(ACCUMULATE) * scale + shift, HARDSWISH), 0.0)
    return at_even, at_odd


@triton.jit
def _through_norm(g, value, inside, by_grad, by_out, constant, ACCUMULATE: tl.constexpr):
    """The gradient of a value of the convolution's map, zero outside, from that of the value normalized."""
    g = g.to(ACCUMULATE) * by_grad + (value.to(ACCUMULATE) * by_out + constant)
    return tl.where(inside, g, 0.0)


@triton.jit
def _four_gradients(g, out, even, columns, by_grad, by_out, constant, ACCUMULATE: tl.constexpr):
    """Four columns of the gradient of the convolution's map, which is zero outside as well."""
    inside = (even > 0) & (even <= columns)
    a = _through_norm(g[0], out[0], inside, by_grad, by_out, constant, ACCUMULATE)
    b = _through_norm(g[1], out[1], even < columns, by_grad, by_out, constant, ACCUMULATE)
    c = _through_norm(g[2], out[2], even + 1 < columns, by_grad, by_out, constant, ACCUMULATE)
    d = _through_norm(g[3], out[3], even + 2 < columns, by_grad, by_out, constant, ACCUMULATE)
    return a, b, c, d


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
def _with_gradients(total, total_z, even_grad, odd_grad, even_deviation, odd_deviation, even, width):
    """Add a row's gradients, and their products with the deviations from the mean, to the sums of each pair."""
    even_grad = tl.where(even < width, even_grad, 0.0)
    odd_grad = tl.where(even + 1 < width, odd_grad, 0.0)
    total += even_grad
    total += odd_grad
    total_z += even_grad * even_deviation
    total_z += odd_grad * odd_deviation
    return total, total_z


@triton.jit
def _store_total(pointers, total, inside):
    tl.store(pointers, tl.sum(total, 0, keep_dims=True), inside)


@triton.jit
def _store_weight_row(pointers, left, center, right, channels, inside):
    """The tile's part of the gradient of three weights."""
    _store_total(pointers, left, inside)
    _store_total(pointers + channels, center, inside)
    _store_total(pointers + 2 * channels, right, inside)


@triton.jit
def _load_both(grad, out, even, inside, channels, columns):
    """Four columns of the gradient of the normalized map, and of the convolution's map, as stored."""
    return load_four(grad, even, inside, channels, columns), load_four(out, even, inside, channels, columns)


@triton.jit
def norm_act_depthwise_backward_kernel(
    grad,
    out,
    out_norm,
    slopes,
    z,
    norm,
    weight,
    grad_u,
    weight_sums,
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
    """One program's tile of the gradient of u, and its part of the weight's gradient and of the sums."""
    tile, image, first, last, even, e = tile_of(height, width, E, tile_rows, BLOCK_P, BLOCK_E)
    inside = e < E
    m = channel_values(norm, e, E, ACCUMULATE)
    s = channel_values(norm + 2 * E, e, E, ACCUMULATE)
    t = channel_values(norm + 3 * E, e, E, ACCUMULATE)
    by_grad = channel_values(slopes, e, E, ACCUMULATE)
    by_out = channel_values(slopes + E, e, E, ACCUMULATE)
    constant = channel_values(slopes + 2 * E, e, E, ACCUMULATE)
    constant -= channel_values(out_norm, e, E, ACCUMULATE) * by_out
    # The weight rotated by 180 degrees: the gradient flows back from where each input contributed.
    w22, w21, w20 = weight_row(weight, 0, e, E, ACCUMULATE)
    w12, w11, w10 = weight_row(weight, 1, e, E, ACCUMULATE)
    w02, w01, w00 = weight_row(weight, 2, e, E, ACCUMULATE)
    zeros = tl.zeros((BLOCK_P, BLOCK_E), ACCUMULATE)
    z += image * stride_b + first.to(tl.int64) * stride_h + (even * STRIDE_W + e)
    above = (image * height + first - 1) * width * E + (even * E + e)
    grad += above
    out += above
    grad_u += (image * height + first) * width * E + (even * E + e)

    # For each row of the gradient, the tile's activated rows above, at and below it.
    two = load_two(z, even, inside, STRIDE_W, width)
    even_below, odd_below = _two_activated(two, even, width, s, t, ACCUMULATE, HARDSWISH)
    columns = columns_of(first - 1, height, width)
    four_g, four_out = _load_both(grad, out, even, inside, E, columns)
    a, b, c, d = _four_gradients(four_g, four_out, even, columns, by_grad, by_out, constant, ACCUMULATE)
    even_sum, odd_sum = add_row(zeros, zeros, a, b, c, d, w00, w01, w02)
    sum20, sum21, sum22 = _add_products(zeros, zeros, zeros, a, b, c, d, even_below, odd_below)
    even_here = even_below
    odd_here = odd_below
    columns = columns_of(first + 1, last, width)
    two = load_two(z + stride_h, even, inside, STRIDE_W, columns)
    even_below, odd_below = _two_activated(two, even, columns, s, t, ACCUMULATE, HARDSWISH)
    grad += width * E
    out += width * E
    four_g, four_out = _load_both(grad, out, even, inside, E, width)
    a, b, c, d = _four_gradients(four_g, four_out, even, width, by_grad, by_out, constant, ACCUMULATE)
    even_sum, odd_sum = add_row(even_sum, odd_sum, a, b, c, d, w10, w11, w12)
    next_even_sum, next_odd_sum = add_row(zeros, zeros, a, b, c, d, w00, w01, w02)
    sum10, sum11, sum12 = _add_products(zeros, zeros, zeros, a, b, c, d, even_here, odd_here)
    sum20, sum21, sum22 = _add_products(sum20, sum21, sum22, a, b, c, d, even_below, odd_below)
    sum00 = zeros
    sum01 = zeros
    sum02 = zeros
    total = zeros
    total_z = zeros
    end = tl.minimum(last + 1, height)
    grad += width * E
    out += width * E
    g_ahead, out_ahead = _load_both(grad, out, even, inside, E, columns_of(first + 1, end, width))
    grad += width * E
    out += width * E
    g_far_ahead, out_far_ahead = _load_both(grad, out, even, inside, E, columns_of(first + 2, end, width))
    two = load_two(z + 2 * stride_h, even, inside, STRIDE_W, columns_of(first + 2, last, width))
    for row in range(first, last):
        even_above = even_here
        odd_above = odd_here
        even_here = even_below
        odd_here = odd_below
        columns = columns_of(row + 2, last, width)
        even_below, odd_below = _two_activated(two, even, columns, s, t, ACCUMULATE, HARDSWISH)
        columns = columns_of(row + 1, height, width)
        a, b, c, d = _four_gradients(g_ahead, out_ahead, even, columns, by_grad, by_out, constant, ACCUMULATE)
        # Loaded two rows ahead (z: one), so that more than one row at a time is on its way from memory.
        two = load_two(z + 3 * stride_h, even, inside, STRIDE_W, columns_of(row + 3, last, width))
        g_ahead, out_ahead = g_far_ahead, out_far_ahead
        grad += width * E
        out += width * E
        g_far_ahead, out_far_ahead = _load_both(grad, out, even, inside, E, columns_of(row + 3, end, width))
        even_grad, odd_grad = add_row(even_sum, odd_sum, a, b, c, d, w20, w21, w22)
        even_sum, odd_sum = add_row(next_even_sum, next_odd_sum, a, b, c, d, w10, w11, w12)
        next_even_sum, next_odd_sum = add_row(zeros, zeros, a, b, c, d, w00, w01, w02)
        sum00, sum01, sum02 = _add_products(sum00, sum01, sum02, a, b, c, d, even_above, odd_above)
        sum10, sum11, sum12 = _add_products(sum10, sum11, sum12, a, b, c, d, even_here, odd_here)
        sum20, sum21, sum22 = _add_products(sum20, sum21, sum22, a, b, c, d, even_below, odd_below)
        # Loaded again from the L1 cache: keeping it for two rows would take registers.
        here = load_two(z, even, inside, STRIDE_W, width)
        even_z = here[0].to(ACCUMULATE)
        odd_z = here[1].to(ACCUMULATE)
        even_grad *= activation_slope(even_z * s + t, HARDSWISH)
        odd_grad *= activation_slope(odd_z * s + t, HARDSWISH)
        tl.store(grad_u, even_grad, inside & (even < width))
        tl.store(grad_u + E, odd_grad, inside & (even + 1 < width))
        total, total_z = _with_gradients(total, total_z, even_grad, odd_grad, even_z - m, odd_z - m, even, width)
        z += stride_h
        grad_u += width * E
    weight_sums += tile * 9 * E + e
    _store_weight_row(weight_sums, sum00, sum01, sum02, E, inside)
    _store_weight_row(weight_sums + 3 * E, sum10, sum11, sum12, E, inside)
    _store_weight_row(weight_sums + 6 * E, sum20, sum21, sum22, E, inside)
    sums += tile * 2 * E + e
    _store_total(sums, total, inside)
    _store_total(sums + E, total_z, inside)
