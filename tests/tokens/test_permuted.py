"""Layouts whose tokens do not lie row by row: permutations, the same as timm's where timm has them.

Shapes: B batch, C channels, H and W the grid.
"""

from functools import partial

import pytest
import torch
from timm.models.hiera import Reroll
from timm.models.nest import deblockify

from localvit.tokens.grid import Grid
from localvit.tokens.permuted import UnfoldedPixelMap, UnfoldedPixels, UnrolledTokens, WindowedTokens

LAYOUTS = {
    "unrolled": (partial(UnrolledTokens, strides=[(2, 2), (3, 5)]), (2, 6 * 20, 7)),
    "unrolled by nothing": (partial(UnrolledTokens, strides=[]), (2, 6 * 20, 7)),
    "unfolded": (partial(UnfoldedPixels, patch_size=(2, 5)), (2 * 10, 3 * 4, 7)),
    "unfolded, channels first": (partial(UnfoldedPixelMap, patch_size=(2, 5)), (2, 7, 10, 3 * 4)),
    "windows": (partial(WindowedTokens, window_size=(3, 5)), (2, 2 * 4, 15, 7)),
}

each_layout = pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS.keys())


@each_layout
def test_layout_is_a_permutation(layout, shape):
    """To the map and back is the identity, both ways. The map has the size of the grid, and images do not mix."""
    layout = layout(Grid((6, 20)))
    tokens = torch.arange(2 * 6 * 20 * 7, dtype=torch.float64).reshape(shape)
    map_BCHW = layout.to_map(tokens)
    assert map_BCHW.shape == (2, 7, 6, 20)
    assert torch.equal(layout.to_tokens(map_BCHW), tokens)
    assert torch.equal(layout.to_map(layout.to_tokens(map_BCHW)), map_BCHW)
    assert map_BCHW[0].max() < map_BCHW[1].min()
    channels_last = "UnfoldedPixelMap" not in type(layout).__name__
    assert map_BCHW.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(layout.to_tokens(map_BCHW.contiguous(memory_format=torch.channels_last)), tokens)
    assert torch.equal(layout.to_tokens(map_BCHW.contiguous()), tokens)


@each_layout
def test_tokens_that_do_not_fill_the_grid_raise(layout, shape):
    with pytest.raises(ValueError, match="120 image tokens do not fill the 6 x 19 grid of 114"):
        layout(Grid((6, 19))).to_map(torch.zeros(shape))
    with pytest.raises(ValueError, match="no patch grid is recorded for 120 image tokens"):
        layout(Grid()).to_map(torch.zeros(shape))


@pytest.mark.parametrize("block_index", range(6))
def test_unrolled_tokens_match_hiera(block_index):
    """timm's Reroll, block by block: two stages are pooled, the third stride is never consumed."""
    strides = [(2, 2), (2, 2), (2, 2)]
    reroll = Reroll((64, 96), (4, 4), strides, [0, 2, 4, 5], q_pool=2)
    left, size = reroll.schedule[block_index]
    tokens = torch.randn(2, size[0] * size[1], 3)
    map_BCHW = UnrolledTokens(Grid(tuple(size)), left).to_map(tokens)
    assert torch.equal(map_BCHW.permute(0, 2, 3, 1), reroll(tokens, block_index))


def test_windows_match_nest():
    """timm's function takes square maps only."""
    tokens = torch.randn(2, 9, 25, 7)
    map_BCHW = WindowedTokens(Grid((15, 15)), (5, 5)).to_map(tokens)
    assert torch.equal(map_BCHW.permute(0, 2, 3, 1), deblockify(tokens, 5))
