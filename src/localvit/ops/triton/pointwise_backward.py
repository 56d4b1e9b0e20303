"""The Triton kernels of the backward pass of a locality module's 1x1 convolutions and what surrounds them.

The projection reads `gate * act(norm(z))`, a map that is never in memory; the expansion writes a map that a batch norm
reads. So the backward pass has three steps over hidden maps, and the depth-wise convolution's own between the second
and the third:

1. `projection_gradients`: the projection's weight and the gate, from the gradient of the projection's output and z.
2. `normalized_gradient`: the gradient of norm(z), and its sums for the batch norm. It multiplies by the weight again,
   since that is cheaper than a map in memory.
3. `expansion_gradients`: the batch norm's backward pass as the operand of the product that makes the input's gradient.

Roofline for maps of M tokens, C and E channels (E = 4 C), in a dtype of 2 bytes: step 1 reads 2 M (C + E) bytes, step 2
reads as much and writes 2 M E, step 3 reads 4 M E and writes 2 M (E + C); each computes 2 M C E operations.

Shapes: B batch, H and W the grid, C channels outside, E hidden channels, G groups of images, T tiles or
blocks.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.triton.launch import Launch, ceil_div
from localvit.ops.triton.rows import (
    Blocks,
    channel_row,
    dot_block,
    factors_of_rows,
    finished,
    normalized,
    overwrites_operands,
)
from localvit.ops.triton.tiles import activate, activation_slope

PROJECTION_BLOCKS = Blocks(rows=64, columns=64, inner=32, num_warps=4, num_stages=3)
"""`rows` are output channels, `columns` hidden channels, `inner` positions."""
GROUP_IMAGES = 8
"""Images whose gradients of the weight one program adds up."""
NORMALIZED_BLOCKS = Blocks(rows=64, columns=64, inner=64, num_warps=4, num_stages=3, registers=128)
EXPANSION_BLOCKS = Blocks(rows=64, columns=256, inner=32, num_warps=4, num_stages=4)


def projection_gradients(
    grad_out_BHWC: Tensor,
    z_BHWE: Tensor,
    norm_4E: Tensor,
    weight_CE: Tensor,
    act: str,
    gate_BE: Tensor | None,
    blocks: Blocks = PROJECTION_BLOCKS,
    group_images: int = GROUP_IMAGES,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the projection's weight (C, E) and of the gate's factors, in float32.

    The second is (T, B, E), to be summed over blocks of output channels. Both follow from one product per image, of the
    output's gradient and the activated map, over positions: the weight's gradient is its sum over images, times the
    factors; a factor's its sum over output channels, times the weight.
    """
    batch, height, width, hidden = z_BHWE.shape
    channels = grad_out_BHWC.shape[3]
    grad_weight_GCE = norm_4E.new_empty(ceil_div(batch, group_images), channels, hidden)
    c_blocks = ceil_div(channels, dot_block(channels, blocks.rows))
    grad_gate_TBE = None if gate_BE is None else norm_4E.new_empty(c_blocks, batch, hidden)
    launch = _projection_launch(batch, height * width, channels, hidden, act, blocks, group_images)
    launch(grad_out_BHWC, z_BHWE, norm_4E, weight_CE, gate_BE, grad_weight_GCE, grad_gate_TBE)
    return grad_weight_GCE.sum(0), grad_gate_TBE


@cache
def _projection_launch(
    batch: int, positions: int, channels: int, hidden: int, act: str, blocks: Blocks, group_images: int
) -> Launch:
    block_c, block_e = dot_block(channels, blocks.rows), dot_block(hidden, blocks.columns)
    programs = ceil_div(batch, group_images) * ceil_div(hidden, block_e) * ceil_div(channels, block_c)
    constants = channels, hidden, act == "hs", block_c, block_e, blocks.inner
    numbers = batch, positions, group_images
    return Launch(projection_gradients_kernel, programs, numbers, constants, blocks.options)


@triton.jit
def projection_gradients_kernel(
    grad_out,
    z,
    norm,
    weight,
    gate,
    grad_weight,
    grad_gate,
    batch,
    positions,
    group_images,
    C: tl.constexpr,
    E: tl.constexpr,
    HARDSWISH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """For a group of images, a block of output channels and one of hidden channels."""
    # The blocks of output channels are neighbors, so that the second finds z in the L2 cache.
    c_blocks = tl.cdiv(C, BLOCK_C)
    e_blocks = tl.cdiv(E, BLOCK_E)
    c_block = tl.program_id(0) % c_blocks
    group = tl.program_id(0) // c_blocks // e_blocks
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    e = (tl.program_id(0) // c_blocks % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    scale = channel_row(norm, 2, e, E)[None, :]
    shift = channel_row(norm, 3, e, E)[None, :]
    at_weight = c[:, None] * E + e[None, :]
    inside_weight = (c < C)[:, None] & (e < E)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_E), tl.float32)
    image = (group * group_images).to(tl.int64)
    for _ in range(0, tl.minimum(group_images, batch - group * group_images)):
        product = tl.zeros((BLOCK_C, BLOCK_E), tl.float32)
        for start in range(0, positions, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            row = image * positions + p
            g = tl.load(grad_out + row[None, :] * C + c[:, None], (p < positions)[None, :] & (c < C)[:, None], 0.0)
            # Where the gradient is zero, outside the map, the activated map may be anything finite.
            a = tl.load(z + row[:, None] * E + e[None, :], (p < positions)[:, None] & (e < E)[None, :], 0.0)
            a = activate(a.to(tl.float32) * scale + shift, HARDSWISH)
            product = tl.dot(g, a.to(g.dtype), product)
        if gate is not None:
            w = tl.load(weight + at_weight, inside_weight, 0.0).to(tl.float32)
            at_gate = image * E + e
            tl.store(grad_gate + c_block * batch * E + at_gate, tl.sum(product * w, 0), e < E)
            product *= tl.load(gate + at_gate, e < E, 0.0).to(tl.float32)[None, :]
        total += product
        image += 1
    tl.store(grad_weight + group.to(tl.int64) * C * E + at_weight, total, inside_weight)


def normalized_gradient(
    grad_out_BHWC: Tensor,
    z_BHWE: Tensor,
    norm_4E: Tensor,
    weight_CE: Tensor,
    act: str,
    gate_BE: Tensor | None,
    grad_mean_BE: Tensor | None,
    blocks: Blocks = NORMALIZED_BLOCKS,
) -> tuple[Tensor, Tensor]:
    """The gradient of norm(z) where the projection reads `gate * act(norm(z))` and the gate pools the activated map.

    Returns it in z's shape and dtype, and (T, 2, E): the sums over each tile of it, and of it times (z - mean).
    """
    batch, height, width, hidden = z_BHWE.shape
    rows, positions = batch * height * width, height * width
    grad_BHWE = z_BHWE.new_empty(z_BHWE.shape)
    sums_T2E = norm_4E.new_empty(ceil_div(rows, blocks.rows), 2, hidden)
    launch = _normalized_launch(rows, positions, grad_out_BHWC.shape[3], hidden, act, blocks)
    launch(grad_out_BHWC, z_BHWE, norm_4E, weight_CE, gate_BE, grad_mean_BE, grad_BHWE, sums_T2E)
    return grad_BHWE, sums_T2E


@cache
def _normalized_launch(rows: int, positions: int, channels: int, hidden: int, act: str, blocks: Blocks) -> Launch:
    block_e, block_c = dot_block(hidden, blocks.columns), dot_block(channels, blocks.inner)
    programs = ceil_div(rows, blocks.rows) * ceil_div(hidden, block_e)
    constants = channels, hidden, act == "hs", positions >= blocks.rows, blocks.rows, block_e, block_c
    return Launch(normalized_gradient_kernel, programs, (rows, positions), constants, blocks.options)


@triton.jit
def normalized_gradient_kernel(
    grad_out,
    z,
    norm,
    weight,
    gate,
    grad_mean,
    grad_normalized,
    sums,
    rows,
    positions,
    C: tl.constexpr,
    E: tl.constexpr,
    HARDSWISH: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program's tile of rows and hidden channels."""
    e_tiles = tl.cdiv(E, BLOCK_E)
    tile = tl.program_id(0) // e_tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = row // positions
    inside = row < rows
    e = (tl.program_id(0) % e_tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    at_row = row.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        g = tl.load(grad_out + at_row * C + c[None, :], inside[:, None] & (c < C)[None, :], 0.0)
        w = tl.load(weight + c[:, None] * E + e[None, :], (c < C)[:, None] & (e < E)[None, :], 0.0)
        total = tl.dot(g, w, total)
    mask = inside[:, None] & (e < E)[None, :]
    if gate is not None:
        total *= factors_of_rows(gate, image, e, inside, E, TWO_IMAGES)
        total += factors_of_rows(grad_mean, image, e, inside, E, TWO_IMAGES) / positions
    value = tl.load(z + at_row * E + e[None, :], mask, 0.0).to(tl.float32)
    total *= activation_slope(normalized(value, norm, e[None, :], E), HARDSWISH)
    rounded = tl.where(mask, total, 0.0).to(grad_normalized.dtype.element_ty)
    tl.store(grad_normalized + at_row * E + e[None, :], rounded, mask)
    total = rounded.to(tl.float32)
    deviation = value - channel_row(norm, 0, e, E)[None, :]
    tl.store(sums + (2 * tile) * E + e, tl.sum(total, 0), e < E)
    tl.store(sums + (2 * tile + 1) * E + e, tl.sum(total * deviation, 0), e < E)


def expansion_gradients(
    grad_BHWE: Tensor,
    z_BHWE: Tensor,
    norm_4E: Tensor,
    slopes_3E: Tensor,
    weight_EC: Tensor,
    dtype: torch.dtype,
    blocks: Blocks = EXPANSION_BLOCKS,
) -> tuple[Tensor, Tensor]:
    """Through a batch norm and the 1x1 convolution before it, whose output is z.

    Args:
        grad_BHWE: the gradient of the batch norm's output.
        slopes_3E: the batch norm's, of `localvit.ops.triton.batch_norm.NormGradients`.
        dtype: of the input's gradient.

    Returns:
        The gradient of the convolution's input (B, H, W, C), and that of z.
    """
    hidden, channels = weight_EC.shape
    grad_x_BHWC = z_BHWE.new_empty((*z_BHWE.shape[:3], channels), dtype=dtype)
    grad_z_BHWE = z_BHWE.new_empty(z_BHWE.shape)
    launch = _expansion_launch(z_BHWE.numel() // hidden, channels, hidden, blocks, z_BHWE.get_device())
    launch(grad_BHWE, z_BHWE, norm_4E, slopes_3E, weight_EC, grad_x_BHWC, grad_z_BHWE)
    return grad_x_BHWC, grad_z_BHWE


@cache
def _expansion_launch(rows: int, channels: int, hidden: int, blocks: Blocks, device: int) -> Launch:
    block_c, block_e = dot_block(channels, blocks.columns), dot_block(hidden, blocks.inner)
    programs = ceil_div(rows, blocks.rows) * ceil_div(channels, block_c)
    constants = channels, hidden, overwrites_operands(device), blocks.rows, block_c, block_e
    return Launch(expansion_gradients_kernel, programs, (rows,), constants, blocks.options)


@triton.jit
def expansion_gradients_kernel(
    grad,
    z,
    norm,
    slopes,
    weight,
    grad_x,
    grad_z,
    rows,
    C: tl.constexpr,
    E: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program's tile of rows and input channels; the first of each block of rows also writes the gradient of z."""
    c_tiles = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // c_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    at_row = row.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, E, BLOCK_E):
        total = finished(total, WAIT)
        e = start + tl.arange(0, BLOCK_E)
        mask = (row < rows)[:, None] & (e < E)[None, :]
        g = tl.load(grad + at_row * E + e[None, :], mask, 0.0)
        value = tl.load(z + at_row * E + e[None, :], mask, 0.0).to(tl.float32)
        value -= channel_row(norm, 0, e[None, :], E)
        g = channel_row(slopes, 0, e[None, :], E) * g.to(tl.float32) + channel_row(slopes, 1, e[None, :], E) * value
        g = (g + channel_row(slopes, 2, e[None, :], E)).to(grad_z.dtype.element_ty)
        if tl.program_id(0) % c_tiles == 0:
            tl.store(grad_z + at_row * E + e[None, :], g, mask)
        w = tl.load(weight + e[:, None] * C + c[None, :], (e < E)[:, None] & (c < C)[None, :], 0.0)
        total = tl.dot(g, w, total)
    tl.store(grad_x + at_row * C + c[None, :], total, (row < rows)[:, None] & (c < C)[None, :])
