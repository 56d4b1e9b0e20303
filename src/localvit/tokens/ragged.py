"""Tokens that come with their places: batches whose samples have grids of their own, and padding.

Each sample's tokens are put on a canvas as high and wide as the largest grid of the batch, with zeros elsewhere. Zeros
beyond a sample's own grid are what a convolution over its own map would see, so each sample gets what it would alone.
Means over the canvas would count its empty places: modules that take them are refused (`localvit.tokens`).

Shapes: B batch, N image tokens, P prefix tokens, C channels, H and W the canvas.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.tokens.grid import Grid, GridSource
from localvit.tokens.layouts import TokenSequence

Places = tuple[tuple[int, int], Tensor | None]
"""A canvas (H, W), and for each token (B, N) its index, from 1, in all canvases of the batch laid end to end; 0 for
padding. None in place of the indices: tokens lie row by row on a grid that the batch shares."""


def places_of_coordinates(coordinates_BN2: Tensor, valid_BN: Tensor | None = None) -> Places:
    """Places of tokens that come with (row, column), as in timm's NaFlex; `valid_BN` is False for padding.

    Raises ValueError for coordinates below 0, and for two tokens of a sample at one place.
    """
    if valid_BN is None:
        valid_BN = torch.ones_like(coordinates_BN2[..., 0], dtype=torch.bool)
    y_BN, x_BN = coordinates_BN2.long().masked_fill(~valid_BN.bool()[..., None], 0).unbind(-1)
    last_y, last_x, first_y, first_x = torch.stack([y_BN.amax(), x_BN.amax(), y_BN.amin(), x_BN.amin()]).tolist()
    if first_y < 0 or first_x < 0:
        raise ValueError(
            f"patch coordinates start at ({first_y}, {first_x}), below 0: mark padding tokens as not valid"
        )
    size = (last_y + 1, last_x + 1)
    index_BN = _index(y_BN, x_BN, valid_BN.bool(), size)
    if (torch.bincount(index_BN.flatten())[1:] > 1).any():
        raise ValueError("two tokens of an image have the same patch coordinates, so they make no map")
    return size, index_BN


def places_of_shapes(shapes_B2: Tensor, num_tokens: int) -> Places:
    """Places of tokens that lie row by row on each sample's own grid (height, width), padding behind them."""
    height, width = shapes_B2.amax(0).tolist()
    n_N = torch.arange(num_tokens, device=shapes_B2.device)
    width_B1 = shapes_B2[:, 1:].clamp(min=1)
    valid_BN = n_N < shapes_B2.prod(1, keepdim=True)
    return (height, width), _index(n_N // width_B1, n_N % width_B1, valid_BN, (height, width))


def _index(y_BN: Tensor, x_BN: Tensor, valid_BN: Tensor, size: tuple[int, int]) -> Tensor:
    batch, (height, width) = len(y_BN), size
    canvas_B1 = torch.arange(batch, device=y_BN.device)[:, None]
    return torch.where(valid_BN, (canvas_B1 * height + y_BN) * width + x_BN + 1, 0)


class PlacedGrid(Grid):
    """A `Grid` whose size is the canvas, and that carries the places of the tokens on it."""

    def __init__(self) -> None:
        super().__init__()
        self.index_BN: Tensor | None = None
        self.locate: Callable[..., Places] | None = None

    def follow_places(self, module: nn.Module, locate: Callable[..., Places]) -> None:
        """Note `locate(*args, **kwargs)` whenever `module` is about to run with these arguments."""
        self.locate = locate
        module.register_forward_pre_hook(self._note_places, with_kwargs=True)

    def _note_places(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert self.locate
        self.size, self.index_BN = self.locate(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class PlaceSource(GridSource):
    """The module of a host that is told where the tokens lie; `how` reads it off that module's arguments."""

    follow: str = "follow_places"

    def grid(self) -> PlacedGrid:
        """A grid for this source, which does not follow it yet."""
        return PlacedGrid()


class PlacedTokens(TokenSequence):
    """Tokens (B, P + N, C) that come with their places, or, where the host is given images, a `TokenSequence`.

    Args:
        grid: the places of the tokens, noted by the host before they come.
        num_prefix_tokens: how many leading tokens are no patches.
        always: whether the host knows no other tokens than placed ones.
    """

    grid: PlacedGrid

    def __init__(self, grid: PlacedGrid, num_prefix_tokens: int = 0, *, always: bool = False) -> None:
        super().__init__(grid, num_prefix_tokens)
        self.always = always

    @property
    def has_empty_places(self) -> bool:
        """Whether maps may have places without a token."""
        return self.always or self.grid.index_BN is not None

    def to_map(self, x_BNC: Tensor) -> Tensor:
        """The image tokens on their canvases, zero elsewhere. Raises ValueError when their number is not the noted."""
        index_BN = self.grid.index_BN
        if index_BN is None or self.grid.size is None:
            return super().to_map(x_BNC)
        batch, tokens, channels = x_BNC.shape
        if (batch, tokens - self.num_prefix_tokens) != index_BN.shape:
            raise ValueError(
                f"{tokens - self.num_prefix_tokens} image tokens ({self.num_prefix_tokens} prefix tokens left out) in "
                f"each of {batch} samples, but places for {index_BN.shape[1]} in {index_BN.shape[0]} were noted: "
                "no token may be dropped between the embeddings and the last block with locality"
            )
        height, width = self.grid.size
        canvas = x_BNC.new_zeros(batch * height * width + 1, channels)
        canvas = canvas.index_copy(0, index_BN.flatten(), x_BNC[:, self.num_prefix_tokens :].flatten(0, 1))
        return canvas[1:].view(batch, height, width, channels).permute(0, 3, 1, 2)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """What is at the places of the tokens, (B, P + N, C), zero for prefix tokens and padding."""
        index_BN = self.grid.index_BN
        if index_BN is None:
            return super().to_tokens(map_BCHW)
        places_LC = map_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
        x_BNC = places_LC.index_select(0, (index_BN - 1).clamp(min=0).flatten()).unflatten(0, index_BN.shape)
        x_BNC = x_BNC.masked_fill((index_BN == 0)[..., None], 0)
        return F.pad(x_BNC, (0, 0, self.num_prefix_tokens, 0)) if self.num_prefix_tokens else x_BNC
