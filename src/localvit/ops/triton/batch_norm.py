"""The Triton kernels of a batch norm's small vectors: statistics of tiles become scale and shift, and gradients.

The maps themselves are normalized by the kernels that read them.

Roofline: the statistics of tiles of 128 tokens have a 32nd of the bytes of a map in a dtype of 2 bytes. The gate's
means read 2 bytes and take 8 operations for each value of the map: 4 operations a byte, where an H100 has 20 in
float32.

Shapes: B batch, E channels, T tiles of a map.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.batch_norms import Running
from localvit.ops.triton.launch import Launch, ceil_div, power_of_2
from localvit.ops.triton.rows import Statistics, channel_row
from localvit.ops.triton.tiles import activate

BLOCK_T, BLOCK_E = 128, 16


def norm_vectors(
    statistics: Statistics, weight_E: Tensor, bias_E: Tensor, running: Running | None, momentum: float, eps: float
) -> Tensor:
    """(4, E) in float32: mean and inverse deviation over all tiles, and the normalization's scale and shift.

    Updates the running statistics, if given, as torch's batch norm does.
    """
    tiles, channels = statistics.means_TN.shape
    norm_4E = statistics.means_TN.new_empty(4, channels)
    launch = _norm_vectors_launch(channels, tiles, momentum, eps)
    launch(*statistics, weight_E, bias_E, norm_4E, *(running or (None, None, None)))
    return norm_4E


@cache
def _norm_vectors_launch(channels: int, *numbers: float) -> Launch:
    return Launch(norm_vectors_kernel, ceil_div(channels, BLOCK_E), numbers, (channels, BLOCK_T, BLOCK_E))


class NormGradients(NamedTuple):
    """A batch norm's backward pass, given the sums of its output's gradient.

    The gradient of a value z whose output has the gradient g is `slopes[0] * g + slopes[1] * (z - mean) + slopes[2]`.
    """

    slopes_3E: Tensor
    weight_E: Tensor
    bias_E: Tensor


def norm_gradients(sums_T2E: Tensor, norm_4E: Tensor, count: int) -> NormGradients:
    """The backward pass of a batch norm.

    Args:
        sums_T2E: sums over each tile of the gradient of the norm's output, and of that times (z - mean).
        norm_4E: of the forward pass.
        count: values of each channel.
    """
    tiles, _, channels = sums_T2E.shape
    gradients = NormGradients(*(norm_4E.new_empty(shape) for shape in ((3, channels), channels, channels)))
    _norm_gradients_launch(channels, tiles, float(count))(sums_T2E, norm_4E, *gradients)
    return gradients


@cache
def _norm_gradients_launch(channels: int, *numbers: float) -> Launch:
    return Launch(norm_gradients_kernel, ceil_div(channels, BLOCK_E), numbers, (channels, BLOCK_T, BLOCK_E))


@triton.jit
def norm_vectors_kernel(
    counts,
    means,
    squares,
    weight,
    bias,
    norm,
    running_mean,
    running_variance,
    num_batches_tracked,
    tiles,
    momentum,
    eps,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The vectors of one block of channels."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    count = 0.0
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        number = tl.load(counts + t, t < tiles, 0.0)
        count += tl.sum(number)
        total += number[:, None] * tl.load(
            means + t[:, None] * E + e[None, :], (t < tiles)[:, None] & inside[None, :], 0.0
        )
    mean = tl.sum(total, 0) / count
    # Chan's formula: squared deviations from each tile's mean, plus those of the tiles' means from the overall mean.
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & inside[None, :]
        number = tl.load(counts + t, t < tiles, 0.0)
        difference = tl.load(means + t[:, None] * E + e[None, :], mask, 0.0) - mean[None, :]
        total += tl.load(squares + t[:, None] * E + e[None, :], mask, 0.0)
        total += number[:, None] * difference * difference
    squared = tl.sum(total, 0)
    inverse_deviation = 1 / tl.sqrt_rn(squared / count + eps)
    scale = tl.load(weight + e, inside, 0.0).to(tl.float32) * inverse_deviation
    shift = tl.load(bias + e, inside, 0.0).to(tl.float32) - mean * scale
    tl.store(norm + e, mean, inside)
    tl.store(norm + E + e, inverse_deviation, inside)
    tl.store(norm + 2 * E + e, scale, inside)
    tl.store(norm + 3 * E + e, shift, inside)
    if running_mean is not None:
        before = tl.load(running_mean + e, inside, 0.0).to(tl.float32)
        tl.store(running_mean + e, before + momentum * (mean - before), inside)
        before = tl.load(running_variance + e, inside, 0.0).to(tl.float32)
        tl.store(running_variance + e, before + momentum * (squared / (count - 1) - before), inside)
        if tl.program_id(0) == 0:
            tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1)


@triton.jit
def norm_gradients_kernel(
    sums,
    norm,
    slopes,
    grad_weight,
    grad_bias,
    tiles,
    count,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The vectors of one block of channels."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    product = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & inside[None, :]
        total += tl.load(sums + (2 * t)[:, None] * E + e[None, :], mask, 0.0)
        product += tl.load(sums + (2 * t + 1)[:, None] * E + e[None, :], mask, 0.0)
    total_sum = tl.sum(total, 0)
    product_sum = tl.sum(product, 0)
    inverse_deviation = channel_row(norm, 1, e, E)
    scale = channel_row(norm, 2, e, E)
    tl.store(slopes + e, scale, inside)
    tl.store(slopes + E + e, -scale * inverse_deviation * inverse_deviation * product_sum / count, inside)
    tl.store(slopes + 2 * E + e, -scale * total_sum / count, inside)
    tl.store(grad_weight + e, product_sum * inverse_deviation, inside)
    tl.store(grad_bias + e, total_sum, inside)


def channel_means(z_BHWE: Tensor, norm_4E: Tensor, act: str) -> Tensor:
    """The means over positions of `act(norm(z))`, (B, E) in float32: what a channel gate pools."""
    batch, height, width, channels = z_BHWE.shape
    mean_BE = norm_4E.new_empty(batch, channels)
    _channel_means_launch(batch, height * width, channels, act)(z_BHWE, norm_4E, mean_BE)
    return mean_BE


@cache
def _channel_means_launch(batch: int, positions: int, channels: int, act: str) -> Launch:
    block_e = min(128, power_of_2(channels))
    programs = batch * ceil_div(channels, block_e)
    return Launch(channel_means_kernel, programs, (positions,), (channels, act == "hs", 32, block_e))


@triton.jit
def channel_means_kernel(
    z,
    norm,
    means,
    positions,
    E: tl.constexpr,
    HARDSWISH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The means of one image and one block of channels."""
    blocks = tl.cdiv(E, BLOCK_E)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    scale = channel_row(norm, 2, e, E)
    shift = channel_row(norm, 3, e, E)
    z += image * positions * E + e[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < positions)[:, None] & (e < E)[None, :]
        value = tl.load(z + p[:, None] * E, mask, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        total += tl.where(mask, activate(value, HARDSWISH), 0.0)
    tl.store(means + image * E + e, tl.sum(total, 0) / positions, e < E)
