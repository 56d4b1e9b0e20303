"""What the kernels of 1x1 convolutions share: tiles of token rows, normalized and gated maps as operands.

A tile is `BLOCK_M` consecutive rows of the batch, a row the channels of one token.

Shapes: B batch, N output channels, T tiles.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.triton.launch import Options, power_of_2
from localvit.ops.triton.tiles import activate


class Blocks(NamedTuple):
    """The sizes of a kernel's tiles and how it is compiled: data, measured by `benchmarks/kernels_speed.py --tiles`."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    """Of a thread, at most: fewer let more warps run at once; None leaves them to Triton."""

    @property
    def options(self) -> Options:
        return Options(self.num_warps, self.num_stages, self.registers)


class Statistics(NamedTuple):
    """Count, mean and squared deviations from it, of each tile of a map: (T,), (T, N), (T, N)."""

    counts_T: Tensor
    means_TN: Tensor
    squares_TN: Tensor

    @classmethod
    def empty(cls, tiles: int, channels: int, like: Tensor) -> "Statistics":
        """Room for the statistics of some tiles, of the device and dtype of a tensor."""
        return cls(like.new_empty(tiles), like.new_empty(tiles, channels), like.new_empty(tiles, channels))


LARGE_SHARED_MEMORY = 161 * 1024
"""Bytes for a block of threads; what the largest tiles need on GPUs of compute capability 8.0, which have 163 KB."""


@cache
def has_large_shared_memory(device: int) -> bool:
    """Whether the largest tiles fit a GPU (-1: none, which has no limit)."""
    if device < 0:
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= LARGE_SHARED_MEMORY)


def dot_block(size: int, largest: int) -> int:
    """A power of two that fits `size` channels, within what tensor cores multiply at once and `largest`."""
    return min(max(power_of_2(size), 16), largest)


@cache
def overwrites_operands(device: int) -> bool:
    """Whether a GPU (-1: none) may overwrite what a product still reads, unless a loop waits for it (`finished`).

    On GPUs of compute capability 9, a product whose left operand was computed, and not just loaded, reads it from
    registers while the next operand is computed: Triton before 3.8 lets both use the same registers (Triton's issue
    9433). Seen as wrong values, now and then, on an H200 with Triton 3.6.
    """
    if device < 0 or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def finished(total, WAIT: tl.constexpr):
    """The sum of products, with `WAIT` once all that were added to it are computed."""
    if WAIT:
        # No instruction, but it reads the sum: so the compiler waits for the products here.
        total = tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=False, pack=1)
    return total


@triton.jit
def channel_row(vectors, number: tl.constexpr, channel, CHANNELS: tl.constexpr):
    """Row `number` of per-channel vectors (numbers, CHANNELS)."""
    return tl.load(vectors + number * CHANNELS + channel, channel < CHANNELS, 0.0)


@triton.jit
def normalized(z, norm, channel, CHANNELS: tl.constexpr):
    """A batch norm's output, given its vectors of `localvit.ops.triton.batch_norm`."""
    scale = channel_row(norm, 2, channel, CHANNELS)
    shift = channel_row(norm, 3, channel, CHANNELS)
    return z.to(tl.float32) * scale + shift


@triton.jit
def normalized_and_activated(z, norm, channel, CHANNELS: tl.constexpr, HARDSWISH: tl.constexpr):
    """The activation of `normalized`."""
    return activate(normalized(z, norm, channel, CHANNELS), HARDSWISH)


@triton.jit
def factors_of_rows(factors, image, channel, inside, CHANNELS: tl.constexpr, TWO_IMAGES: tl.constexpr):
    """The rows' factors (BLOCK_M, channels), of `factors` (B, CHANNELS): those of each row's image.

    With `TWO_IMAGES` a tile's rows are of one image or two: then two rows are read, and not one for each of the tile's.
    """
    known = (channel < CHANNELS)[None, :]
    if TWO_IMAGES:
        first = tl.min(image, 0)
        last = tl.max(tl.where(inside, image, first), 0)
        of_first = tl.load(factors + first * CHANNELS + channel, channel < CHANNELS, 0.0).to(tl.float32)
        of_last = tl.load(factors + last * CHANNELS + channel, channel < CHANNELS, 0.0).to(tl.float32)
        return tl.where((image == first)[:, None], of_first[None, :], of_last[None, :])
    else:
        mask = inside[:, None] & known
        return tl.load(factors + image[:, None] * CHANNELS + channel[None, :], mask, 0.0).to(tl.float32)
