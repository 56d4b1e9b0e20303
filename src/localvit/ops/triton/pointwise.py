"""The Triton kernel of 1x1 convolutions: with a batch norm, activation and gate before it, or steps after it.

One program computes a tile of rows and output channels. What comes before the product is computed on the tile's operand
as it is loaded, what comes after it on the tile's result before it is stored: neither takes a pass over memory.

Roofline for a map of M tokens, K to N channels, in a dtype of 2 bytes: 2 M (K + N) bytes, 2 M K N operations. With
K = 192 and N = 768 these are 154 operations a byte, below the 200 where an H200's matrix units, and not its memory,
would be the limit.

Shapes: B batch, S rows of an image in memory, R rows written, H and W the grid, K input channels, N output channels, T
tiles.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.reference import Shape, check_pointwise, shape_of
from localvit.ops.triton.launch import Launch, ceil_div
from localvit.ops.triton.rows import (
    Blocks,
    Statistics,
    dot_block,
    factors_of_rows,
    finished,
    has_large_shared_memory,
    normalized_and_activated,
    overwrites_operands,
)
from localvit.ops.triton.tiles import activate

WIDENING = Blocks(rows=128, columns=128, inner=32, num_warps=4, num_stages=4)
NARROWING = Blocks(rows=128, columns=256, inner=64, num_warps=8, num_stages=3)
"""Up to 161 KB of shared memory on GPUs of compute capability 8.0, which have 163, and 193 KB on 9.0 and 10.0."""
SMALL_NARROWING = NARROWING._replace(inner=32)
"""For GPUs with less shared memory: up to 81 KB. Two stages of 64 channels instead would spill registers."""


def pointwise(
    x_BSK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    act: str | None = None,
    gate_BK: Tensor | None = None,
    skipped: int = 0,
    num_prefix_tokens: int = 0,
    blocks: Blocks | None = None,
) -> Tensor:
    """As `localvit.ops.reference.pointwise`, for rows in bfloat16 or float16 with contiguous channels.

    By itself, for benchmarks and tests: a module's steps are launched together (`ops.triton.feed_forward`).
    """
    batch, rows, _ = x_BSK.shape
    launch = launch_for(
        *(x_BSK.shape, x_BSK.stride(), weight_NK.shape, shape_of(bias_N), shape_of(gate_BK), skipped),
        *(num_prefix_tokens, None, act, blocks, x_BSK.get_device()),
    )
    gate_BK = None if gate_BK is None else gate_BK.contiguous()
    out_BRN = weight_NK.new_empty((batch, rows - skipped + num_prefix_tokens, weight_NK.shape[0]))
    launch(x_BSK, weight_NK.contiguous(), None, gate_BK, bias_N, out_BRN, None, None, None)
    return out_BRN


def pointwise_with_statistics(x_BSK: Tensor, weight_NK: Tensor, blocks: Blocks = WIDENING) -> tuple[Tensor, Statistics]:
    """The product with the weight (B, S, N), in its dtype, and the statistics of the product's tiles."""
    batch, rows, _ = x_BSK.shape
    columns = weight_NK.shape[0]
    launch = launch_for(
        x_BSK.shape, x_BSK.stride(), weight_NK.shape, None, None, 0, 0, None, None, blocks, x_BSK.get_device()
    )
    out_BSN = weight_NK.new_empty((batch, rows, columns))
    tiles = ceil_div(batch * rows, blocks.rows)
    statistics = Statistics.empty(tiles, columns, weight_NK.new_empty(0, dtype=torch.float32))
    launch(x_BSK, weight_NK, None, None, None, out_BSN, *statistics)
    return out_BSN, statistics


def normalized_pointwise(
    z_BSK: Tensor,
    weight_NK: Tensor,
    norm_4K: Tensor,
    act: str,
    gate_BK: Tensor | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """`gate * act(norm(z))` times the weight (B, S, N), where `norm_4K` are vectors of `ops.triton.batch_norm`."""
    launch = launch_for(
        *(z_BSK.shape, z_BSK.stride(), weight_NK.shape, None, shape_of(gate_BK), 0, 0, act, None, blocks),
        z_BSK.get_device(),
    )
    out_BSN = weight_NK.new_empty((*z_BSK.shape[:2], weight_NK.shape[0]))
    launch(z_BSK, weight_NK, norm_4K, gate_BK, None, out_BSN, None, None, None)
    return out_BSN


def _narrowing(device: int) -> Blocks:
    return NARROWING if has_large_shared_memory(device) else SMALL_NARROWING


@cache
def launch_for(
    shape: Shape,
    strides: Shape,
    weight: Shape,
    bias: Shape | None,
    gate: Shape | None,
    skipped: int,
    num_prefix_tokens: int,
    norm_act: str | None,
    act: str | None,
    blocks: Blocks | None,
    device: int,
) -> Launch:
    """The launch for operands of some shapes: rows (B, S, K), a batch norm before the product if it has `norm_act`.

    Raises ValueError as `localvit.ops.reference.pointwise`.
    """
    check_pointwise(shape, weight, bias, act, gate)
    batch, rows, inner = shape
    tokens, columns = rows - skipped + num_prefix_tokens, weight[0]
    if blocks is None:
        blocks = WIDENING if columns > inner and norm_act is None else _narrowing(device)
    block_n, block_k = dot_block(columns, blocks.columns), dot_block(inner, blocks.inner)
    return Launch(
        pointwise_kernel,
        ceil_div(batch * tokens, blocks.rows) * ceil_div(columns, block_n),
        (batch * tokens, tokens, num_prefix_tokens, skipped, *strides[:2]),
        (
            *(inner, columns, norm_act == "hs", act, tokens >= blocks.rows, overwrites_operands(device)),
            *(blocks.rows, block_n, block_k),
        ),
        blocks.options,
    )


@triton.jit
def pointwise_kernel(
    x,
    weight,
    norm,
    gate,
    bias,
    out,
    counts,
    means,
    squares,
    rows,
    tokens,
    prefix,
    skipped,
    stride_b,
    stride_s,
    K: tl.constexpr,
    N: tl.constexpr,
    NORM_HARDSWISH: tl.constexpr,
    ACT: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program's tile of the rows that are written; `norm`, `gate`, `bias` and the statistics may be None."""
    # The tiles of one block of rows are neighbors, so that the second finds its rows in the L2 cache.
    column_tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // column_tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = row // tokens
    position = row % tokens - prefix
    inside = (row < rows) & (position >= 0)
    n = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += (image.to(tl.int64) * stride_b + (position + skipped) * stride_s)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if norm is not None or gate is not None:
            total = finished(total, WAIT)
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + k[None, :], inside[:, None] & (k < K)[None, :], 0.0)
        b = tl.load(weight + n[None, :] * K + k[:, None], (n < N)[None, :] & (k < K)[:, None], 0.0)
        if norm is not None:
            a = normalized_and_activated(a, norm, k[None, :], K, NORM_HARDSWISH)
        if gate is not None:
            a = a.to(tl.float32) * factors_of_rows(gate, image, k, inside, K, TWO_IMAGES)
        total = tl.dot(a.to(b.dtype), b, total)
    if bias is not None:
        total += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    if ACT is not None:
        total = activate(total, ACT == "hs")
    total = tl.where(inside[:, None], total, 0.0)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * N + n[None, :], rounded, (row < rows)[:, None] & (n < N)[None, :])
    if means is not None:
        # Of the rounded values, which the batch norm will normalize.
        value = rounded.to(tl.float32)
        count = tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        mean = tl.sum(value, 0) / count
        deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
        tl.store(means + tile * N + n, mean, n < N)
        tl.store(squares + tile * N + n, tl.sum(deviation * deviation, 0), n < N)
        tl.store(counts + tile, count)
