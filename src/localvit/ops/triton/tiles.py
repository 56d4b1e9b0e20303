"""What the Triton kernels share: how maps are divided into tiles, and a tile's loads, taps and activations.

One program computes a tile: `BLOCK_P` pairs of neighboring columns, `BLOCK_E` channels, walking down the tile's rows
with the partial sums of the output rows in registers. So each row is loaded once (and the rows around a tile once
more), as the columns 2j - 1 to 2j + 2 of each pair; these loads overlap in the L1 cache. Each tile writes its sums over
positions to a buffer that torch adds up, so that results are bit-exact from run to run.

Shapes: B batch, H and W the grid, E channels, T tiles.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.reference import Shape
from localvit.ops.triton.launch import Launch, Options, ceil_div, power_of_2

TILE_ROWS = 14
"""The largest number of rows of a tile: all rows of a 224-pixel image with 16-pixel patches."""


class Area(NamedTuple):
    """The size of a kernel's tiles and how it is compiled: data, measured by `benchmarks/kernels_speed.py --tiles`."""

    values: int
    """Pairs of columns times channels; each thread computes an equal part."""
    num_warps: int = 4
    registers: int | None = 128
    """Of a thread, at most: with 128, 16 warps fit an NVIDIA multiprocessor, which overlaps memory and arithmetic."""

    @property
    def options(self) -> Options:
        return Options(self.num_warps, maxnreg=self.registers)


@dataclass(frozen=True)
class Tiles:
    """How maps (B, H, W, E) are divided into tiles, numbered column by column, row by row, image by image."""

    area: int
    """Pairs of columns times channels of a tile."""
    batch: int
    """B."""
    height: int
    """H."""
    width: int
    """W."""
    channels: int
    """E."""

    @cached_property
    def rows(self) -> int:
        """Rows of a tile, as equal as possible."""
        return ceil_div(self.height, ceil_div(self.height, TILE_ROWS))

    @cached_property
    def pairs(self) -> int:
        """Pairs of columns of a tile: 8, or 4 where that leaves fewer columns idle."""
        return 8 if (self.width - 1) % 16 >= 8 else 4

    @cached_property
    def block(self) -> int:
        """Channels of a tile."""
        return min(self.area // self.pairs, power_of_2(self.channels))

    @cached_property
    def per_image(self) -> int:
        """Tiles of one image's map."""
        return ceil_div(self.height, self.rows) * ceil_div(self.width, 2 * self.pairs)

    @cached_property
    def number(self) -> int:
        """T, tiles of all maps."""
        return self.batch * self.per_image

    @cached_property
    def programs(self) -> int:
        """Their number: blocks of channels within tiles, so that neighboring programs read nearby memory."""
        return self.number * ceil_div(self.channels, self.block)


@cache
def launch_in_tiles(
    kernel: Any, shape: Shape, strides: Shape, dtype: torch.dtype, act: str, area: Area
) -> tuple[Tiles, Launch]:
    """How a kernel divides maps of one shape, and its launch.

    Channels and the distance between columns are constants of the compilation: so loads hold distances between columns,
    and full blocks of channels need no masks.
    """
    tiles = Tiles(area.values, *shape)
    numbers = tiles.height, tiles.width, tiles.rows, *strides[:2]
    accumulate = tl.float64 if dtype == torch.float64 else tl.float32
    constants = tiles.channels, strides[2], accumulate, act == "hs", tiles.pairs, tiles.block
    return tiles, Launch(kernel, tiles.programs, numbers, constants, area.options)


def check_layout(*maps: Tensor) -> None:
    """Raise ValueError for an empty map, or one whose channels are not contiguous."""
    for map_BHWE in maps:
        if map_BHWE.numel() == 0 or map_BHWE.stride(3) != 1:
            raise ValueError(
                "the kernels take non-empty maps with contiguous channels, not shape "
                f"{tuple(map_BHWE.shape)} with strides {map_BHWE.stride()}: use localvit.ops.reference"
            )


@triton.jit
def tile_of(height, width, channels, tile_rows, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """A program's tile: its number, image, first row, end row, first column of each pair, and channels."""
    blocks = tl.cdiv(channels, BLOCK_E)
    column_tiles = tl.cdiv(width, 2 * BLOCK_P)
    row_tiles = tl.cdiv(height, tile_rows)
    tile = tl.program_id(0) // blocks
    first = (tile // column_tiles) % row_tiles * tile_rows
    # 64 bits, since a batch of maps may hold more than 2 ** 31 values.
    image = (tile // (column_tiles * row_tiles)).to(tl.int64)
    even = (tile % column_tiles) * (2 * BLOCK_P) + 2 * tl.arange(0, BLOCK_P)[:, None]
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    return tile.to(tl.int64), image, first, tl.minimum(first + tile_rows, height), even, e


@triton.jit
def channel_values(pointer, e, channels, ACCUMULATE: tl.constexpr):
    """One value per channel."""
    return tl.load(pointer + e, e < channels, 0.0).to(ACCUMULATE)


@triton.jit
def weight_row(weight, row, e, channels, ACCUMULATE: tl.constexpr):
    """The three weights of a row of the convolution's kernel, from (E, 9)."""
    weight += 9 * e + 3 * row
    left = tl.load(weight, e < channels, 0.0).to(ACCUMULATE)
    center = tl.load(weight + 1, e < channels, 0.0).to(ACCUMULATE)
    right = tl.load(weight + 2, e < channels, 0.0).to(ACCUMULATE)
    return left, center, right


@triton.jit
def columns_of(row, height, width):
    """How many columns a row of the map has: none outside it."""
    return tl.where((row >= 0) & (row < height), width, 0)


@triton.jit
def load_two(pointers, even, inside, stride_w, columns):
    """Each pair's own columns of a row, as stored; zero outside the map."""
    at_even = tl.load(pointers, inside & (even < columns), 0.0)
    return at_even, tl.load(pointers + stride_w, inside & (even + 1 < columns), 0.0)


@triton.jit
def load_four(pointers, even, inside, stride_w, columns):
    """Each pair's own columns of a row between the one before and the one after, as stored; zero outside the map."""
    before = tl.load(pointers - stride_w, inside & (even > 0) & (even <= columns), 0.0)
    at_even = tl.load(pointers, inside & (even < columns), 0.0)
    at_odd = tl.load(pointers + stride_w, inside & (even + 1 < columns), 0.0)
    after = tl.load(pointers + 2 * stride_w, inside & (even + 2 < columns), 0.0)
    return before, at_even, at_odd, after


@triton.jit
def converted(four, DTYPE: tl.constexpr):
    """Four columns in another dtype."""
    return four[0].to(DTYPE), four[1].to(DTYPE), four[2].to(DTYPE), four[3].to(DTYPE)


@triton.jit
def four_columns(pointers, even, inside, stride_w, columns, ACCUMULATE: tl.constexpr):
    """`load_four` in the dtype of the sums."""
    return converted(load_four(pointers, even, inside, stride_w, columns), ACCUMULATE)


@triton.jit
def add_taps(total, left, center, right, w_left, w_center, w_right):
    """Add what one row of the convolution's kernel sees."""
    total += left * w_left
    total += center * w_center
    total += right * w_right
    return total


@triton.jit
def add_row(even_sum, odd_sum, a, b, c, d, w_left, w_center, w_right):
    """Add to both columns of each pair what one row of the convolution's kernel sees of four columns."""
    even_sum = add_taps(even_sum, a, b, c, w_left, w_center, w_right)
    return even_sum, add_taps(odd_sum, b, c, d, w_left, w_center, w_right)


@triton.jit
def _divided(u, DIVISOR: tl.constexpr):
    """u / DIVISOR: by the reciprocal in float32, since constants are float32 where Triton compiles."""
    if u.dtype == tl.float64:
        return u / DIVISOR
    else:
        return u * (1 / DIVISOR)


@triton.jit
def activate(u, HARDSWISH: tl.constexpr):
    """h-swish or relu6; NaN stays NaN."""
    if HARDSWISH:
        return u * tl.minimum(tl.maximum(_divided(u, 6) + 0.5, 0.0), 1.0)
    else:
        return tl.clamp(u, 0.0, 6.0, tl.PropagateNan.ALL)


@triton.jit
def activation_slope(u, HARDSWISH: tl.constexpr):
    """The derivative, at the kinks the one that torch takes."""
    if HARDSWISH:
        return tl.where(u < -3.0, 0.0, tl.where(u <= 3.0, _divided(u, 3) + 0.5, 1.0))
    else:
        return tl.where((u > 0.0) & (u < 6.0), 1.0, 0.0)
