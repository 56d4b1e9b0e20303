"""How tokens lie on the patch grid: the `Layout` of a feed-forward's tokens, and layouts whose tokens lie row by row.

Shapes: B batch, N tokens (prefix tokens first), P prefix tokens (class, distillation, register), C channels, H and W
the grid.
"""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from localvit.tokens.grid import Grid


def tokens_to_map(x_BNC: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """View the image tokens of (B, P + H * W, C) as a channels-last map (B, C, H, W), without a copy.

    Raises ValueError with both numbers when the image tokens do not fill the grid.
    """
    height, width = grid_size
    image_tokens = x_BNC.shape[1] - num_prefix_tokens
    if image_tokens != height * width:
        raise ValueError(
            f"{image_tokens} image tokens ({num_prefix_tokens} prefix tokens left out) do not fill "
            f"the {height} x {width} grid of {height * width}"
        )
    return x_BNC[:, num_prefix_tokens:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def map_to_tokens(map_BCHW: Tensor) -> Tensor:
    """View a map (B, C, H, W) as its tokens (B, H * W, C); no copy for a channels-last map."""
    return map_BCHW.flatten(2).transpose(1, 2)


class Layout(nn.Module, ABC):
    """How the tokens of a feed-forward make a map, and a map makes tokens again. Has no parameters."""

    num_prefix_tokens: int = 0
    """Number of leading tokens that are not patches."""

    @abstractmethod
    def to_map(self, x: Tensor) -> Tensor:
        """The image tokens as a map (B, C, H, W). Raises ValueError when they do not fill the patch grid."""

    @abstractmethod
    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map in the shape of the tokens, zero for tokens that are not on it, so that it can be added to them."""

    @property
    def has_empty_positions(self) -> bool:
        """Whether the map may have positions without a token, so that means over it would be wrong."""
        return False


class TokenSequence(Layout):
    """Tokens (B, P + H * W, C), row by row after prefix tokens: the layout of most vision transformers.

    Args:
        grid: the patch grid of the tokens.
        num_prefix_tokens: number of leading tokens that are not patches.
    """

    def __init__(self, grid: Grid, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens

    def to_map(self, x_BNC: Tensor) -> Tensor:
        """The image tokens as a channels-last map, a view. Raises ValueError when they do not fill the patch grid."""
        size = self.grid.size_for(x_BNC.shape[1] - self.num_prefix_tokens, self.num_prefix_tokens)
        return tokens_to_map(x_BNC, size, self.num_prefix_tokens)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as tokens (B, P + H * W, C), zero for prefix tokens."""
        x_BNC = map_to_tokens(map_BCHW)
        return F.pad(x_BNC, (0, 0, self.num_prefix_tokens, 0)) if self.num_prefix_tokens else x_BNC


class ChannelsLastMap(Layout):
    """Tokens that already form a map (B, H, W, C): the layout of blocks that never flatten them. Needs no grid."""

    def __init__(self, grid: None = None) -> None:
        super().__init__()

    def to_map(self, x_BHWC: Tensor) -> Tensor:
        """The map (B, C, H, W), a view."""
        return x_BHWC.permute(0, 3, 1, 2)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as (B, H, W, C), a view."""
        return map_BCHW.permute(0, 2, 3, 1)


class ChannelsFirstMap(Layout):
    """A map (B, C, H, W): the layout of feed-forwards made of 1x1 convolutions. Needs no grid."""

    def __init__(self, grid: None = None) -> None:
        super().__init__()

    def to_map(self, map_BCHW: Tensor) -> Tensor:
        """The map itself."""
        return map_BCHW

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map itself."""
        return map_BCHW


def refuse_empty_positions(layout: Layout, part: str) -> None:
    """Raise ValueError, naming the `part` that takes means over maps, if maps of this layout have empty positions."""
    if layout.has_empty_positions:
        raise ValueError(
            f"{part} takes means over whole maps, but this batch holds images of several shapes, and the empty "
            "positions of the smaller ones would count: use an Adapter without a gate and without batch norm"
        )
