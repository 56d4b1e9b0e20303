"""Tokens to map and back, for tokens that lie row by row.

Shapes: B batch, N tokens (prefix tokens first), P prefix tokens (class, distillation, register), C channels, H and W
the grid.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from localvit.tokens.grid import Grid


def tokens_to_map(x_BNC: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """View the image tokens of (B, P + H * W, C) as a channels-last map (B, C, H, W), without a copy.

    Raises ValueError, saying both numbers, when the image tokens do not fill the grid.
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


class TokenSequence(nn.Module):
    """Tokens (B, P + H * W, C), row by row, behind prefix tokens: the layout of most vision transformers.

    A layout says how tokens make a map: `to_map` gives the image tokens as (B, C, H, W), `to_tokens` puts such a map
    back, with zeros for what is no image token, so that it can be added to the tokens. Without parameters. Where maps
    may have places without a token, `has_empty_places` is true.

    Args:
        grid: the grid of the tokens, noted by the host before they come.
        num_prefix_tokens: how many leading tokens are no patches.
    """

    def __init__(self, grid: Grid, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens

    def to_map(self, x_BNC: Tensor) -> Tensor:
        """The image tokens as a channels-last map, a view. Raises ValueError when they do not fill the noted grid."""
        if self.grid.size is None:
            raise ValueError(
                f"no patch grid was noted for these {x_BNC.shape[1]} tokens: run the whole model, not a block"
            )
        return tokens_to_map(x_BNC, self.grid.size, self.num_prefix_tokens)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as tokens (B, P + H * W, C), zero for prefix tokens."""
        x_BNC = map_to_tokens(map_BCHW)
        return F.pad(x_BNC, (0, 0, self.num_prefix_tokens, 0)) if self.num_prefix_tokens else x_BNC


class ChannelsLastMap(nn.Module):
    """Tokens that lie as a map already, (B, H, W, C): the layout of blocks that never flatten them. Needs no grid."""

    def __init__(self, grid: None = None) -> None:
        super().__init__()

    def to_map(self, x_BHWC: Tensor) -> Tensor:
        """The map (B, C, H, W), a view."""
        return x_BHWC.permute(0, 3, 1, 2)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as (B, H, W, C), a view."""
        return map_BCHW.permute(0, 2, 3, 1)


class ChannelsFirstMap(nn.Module):
    """A map (B, C, H, W): the layout of feed-forwards made of 1x1 convolutions. Needs no grid."""

    def __init__(self, grid: None = None) -> None:
        super().__init__()

    def to_map(self, map_BCHW: Tensor) -> Tensor:
        """The map itself."""
        return map_BCHW

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map itself."""
        return map_BCHW


def refuse_empty_places(layout: nn.Module, part: str) -> None:
    """Raise ValueError, naming the `part` that takes means over maps, for a layout whose maps have empty places."""
    if getattr(layout, "has_empty_places", False):
        raise ValueError(
            f"{part} takes means over whole maps, but images of several shapes share these, and the places that they "
            "leave empty would count: only a branch without gate and batch norm can work on them"
        )
