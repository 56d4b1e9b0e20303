"""Batches whose images have grids of their own, and padding: each token comes with its position.

The tokens of each sample are written to a canvas as high and wide as the largest map of the batch, with zeros
elsewhere. A convolution over a sample's own map sees zeros beyond its border too, so each sample gets what it would get
in a batch by itself. Means over the canvas would count the empty positions, so modules that take such means are refused
(`localvit.tokens.layouts.refuse_empty_positions`).

Shapes: B batch, N image tokens, P prefix tokens, C channels, H and W the canvas.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from localvit.tokens.grid import Grid, Size
from localvit.tokens.layouts import TokenSequence
from localvit.tokens.sources import ArgumentsGrid


@dataclass(frozen=True, eq=False)
class Placement:
    """The positions of the tokens of a batch."""

    size: Size
    """Height and width of the canvas."""
    index_BN: Tensor
    """For each token its index, from 1, in all canvases of the batch laid end to end; 0 for padding."""


def placement_of_coordinates(coordinates_BN2: Tensor, valid_BN: Tensor | None = None) -> Placement:
    """The placement of tokens that come with (row, column), as in timm's NaFlex; `valid_BN` is False for padding.

    Only their differences matter: each sample's canvas starts at its first row and column.

    Raises ValueError for negative coordinates, and for two tokens of a sample at one position.
    """
    if valid_BN is None:
        valid_BN = torch.ones_like(coordinates_BN2[..., 0], dtype=torch.bool)
    padding_BN1 = ~valid_BN.bool()[..., None]
    first_B12 = coordinates_BN2.long().masked_fill(padding_BN1, _BEYOND).amin(1, keepdim=True)
    from_first_BN2 = (coordinates_BN2.long() - first_B12).masked_fill(padding_BN1, 0)
    last_2, first_2 = from_first_BN2.amax((0, 1)), first_B12.amin((0, 1))
    last_y, last_x, first_y, first_x = torch.cat([last_2, first_2]).tolist()
    if first_y < 0 or first_x < 0:
        raise ValueError(
            f"patch coordinates start at ({first_y}, {first_x}), below 0: mark padding tokens as not valid"
        )
    y_BN, x_BN = from_first_BN2.unbind(-1)
    size = (last_y + 1, last_x + 1)
    index_BN = _index(y_BN, x_BN, valid_BN.bool(), size)
    if (torch.bincount(index_BN.flatten())[1:] > 1).any():
        raise ValueError("two tokens of an image have the same patch coordinates, so they do not form a map")
    return Placement(size, index_BN)


_BEYOND = torch.iinfo(torch.int64).max
"""A coordinate beyond all others."""


def placement_of_shapes(shapes_B2: Tensor, num_tokens: int) -> Placement:
    """The placement of tokens that lie row by row on each sample's own grid (height, width), followed by padding."""
    height, width = shapes_B2.amax(0).tolist()
    n_N = torch.arange(num_tokens, device=shapes_B2.device)
    width_B1 = shapes_B2[:, 1:].clamp(min=1)
    valid_BN = n_N < shapes_B2.prod(1, keepdim=True)
    return Placement((height, width), _index(n_N // width_B1, n_N % width_B1, valid_BN, (height, width)))


def _index(y_BN: Tensor, x_BN: Tensor, valid_BN: Tensor, size: Size) -> Tensor:
    batch, (height, width) = len(y_BN), size
    canvas_B1 = torch.arange(batch, device=y_BN.device)[:, None]
    return torch.where(valid_BN, (canvas_B1 * height + y_BN) * width + x_BN + 1, 0)


class RaggedGrid(Grid):
    """A `Grid` whose host may also be given tokens with their positions: it then records a `Placement`."""

    @property
    def placement(self) -> Placement | None:
        """The placement recorded in the forward pass in progress; None where tokens lie row by row on one grid.

        Raises ValueError when several were recorded, in nested forward passes.
        """
        candidates = self._candidates()
        if not any(isinstance(candidate, Placement) for candidate in candidates):
            return None
        if len(candidates) > 1:
            raise ValueError(
                f"{len(candidates)} batches of different shapes were recorded in nested calls of this model, and it "
                "is not known which one these tokens are of: call model(...) in hooks, not its other methods"
            )
        return candidates[0]


@dataclass(frozen=True, eq=False)
class ArgumentsPlacement(ArgumentsGrid):
    """The placement follows from the arguments of `module`: `read` returns a `Placement`, or (height, width)."""

    def new_grid(self) -> RaggedGrid:
        return RaggedGrid()


class RaggedTokens(TokenSequence):
    """Tokens (B, P + N, C) with a `Placement`, or, where the host is given plain images, a `TokenSequence`.

    Args:
        grid: the positions of the tokens.
        num_prefix_tokens: number of leading tokens that are not patches.
        always: whether the host takes no plain images.
    """

    grid: RaggedGrid

    def __init__(self, grid: RaggedGrid, num_prefix_tokens: int = 0, *, always: bool = False) -> None:
        super().__init__(grid, num_prefix_tokens)
        self.always = always

    @property
    def has_empty_positions(self) -> bool:
        return self.always or self.grid.placement is not None

    def to_map(self, x_BNC: Tensor) -> Tensor:
        """The image tokens on their canvases, zero elsewhere. Raises ValueError when their number does not match."""
        placement = self.grid.placement
        if placement is None:
            return super().to_map(x_BNC)
        batch, tokens, channels = x_BNC.shape
        index_BN = placement.index_BN
        if (batch, tokens - self.num_prefix_tokens) != index_BN.shape:
            raise ValueError(
                f"{tokens - self.num_prefix_tokens} image tokens ({self.num_prefix_tokens} prefix tokens left out) in "
                f"each of {batch} samples, but positions for {index_BN.shape[1]} in {index_BN.shape[0]} samples: no "
                "token may be dropped between the embeddings and the last block with locality"
            )
        height, width = placement.size
        canvas = x_BNC.new_zeros(batch * height * width + 1, channels)
        canvas = canvas.index_copy(0, index_BN.flatten(), x_BNC[:, self.num_prefix_tokens :].flatten(0, 1))
        return canvas[1:].view(batch, height, width, channels).permute(0, 3, 1, 2)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map at the positions of the tokens, (B, P + N, C), zero for prefix tokens and padding."""
        placement = self.grid.placement
        if placement is None:
            return super().to_tokens(map_BCHW)
        index_BN = placement.index_BN
        positions_LC = map_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
        x_BNC = positions_LC.index_select(0, (index_BN - 1).clamp(min=0).flatten()).unflatten(0, index_BN.shape)
        x_BNC = x_BNC.masked_fill((index_BN == 0)[..., None], 0)
        return F.pad(x_BNC, (0, 0, self.num_prefix_tokens, 0)) if self.num_prefix_tokens else x_BNC
