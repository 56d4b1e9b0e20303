"""Layouts of tokens that do not lie row by row. To the map and back is an exact permutation, with one copy each.

Shapes: B batch, N tokens, C channels, H and W the grid; P pixels in a patch; T windows.
"""

from collections.abc import Sequence

from torch import Tensor

from localvit.tokens.grid import Grid
from localvit.tokens.layouts import Layout


class UnrolledTokens(Layout):
    """Tokens (B, N, C) unrolled as Hiera does it (arXiv 2306.00989), so that what a stage pools is contiguous.

    A stride (Sy, Sx) divides the grid into cells of Sy by Sx tokens. The tokens at the first position of every cell
    come first, then those at the second, and so on. Each such group is a grid that the next stride unrolls in turn.

    Args:
        grid: the grid of the tokens.
        strides: the strides (Sy, Sx) in the order of unrolling; empty for tokens that lie row by row.
    """

    def __init__(self, grid: Grid, strides: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.grid = grid
        self.strides = tuple(strides)

    def to_map(self, x_BNC: Tensor) -> Tensor:
        """The tokens as a channels-last map. Raises ValueError when they do not fill the grid."""
        height, width = self.grid.size_for(x_BNC.shape[1])
        splits = self._splits(height, width)
        x = x_BNC.unflatten(1, [size for split in splits for size in split])
        # In the tokens the first stride is the slowest axis; in the map it is the fastest one of rows and columns.
        rows, columns = range(2 * len(splits) - 1, 0, -2), range(2 * len(splits), 0, -2)
        return x.permute(0, *rows, *columns, -1).reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as tokens (B, N, C)."""
        rows, columns = zip(*reversed(self._splits(*map_BCHW.shape[2:])), strict=True)
        x = map_BCHW.permute(0, 2, 3, 1).unflatten(2, columns).unflatten(1, rows)
        axes = [axis for row in range(len(rows), 0, -1) for axis in (row, row + len(rows))]
        return x.permute(0, *axes, -1).flatten(1, -2)

    def _splits(self, height: int, width: int) -> list[tuple[int, int]]:
        """The factors of (rows, columns): the strides, then the number of cells of the last one."""
        for stride_y, stride_x in self.strides:
            height, width = height // stride_y, width // stride_x
        return [*self.strides, (height, width)]


class UnfoldedPixels(UnrolledTokens):
    """Tokens (B * P, N, C): each of the P positions in a patch has its own sequence, as in MobileViT.

    The map is the map of pixels. Source: arXiv 2110.02178, section 3.1.

    Args:
        grid: the grid of the pixels.
        patch_size: height and width of a patch, in pixels.
    """

    def __init__(self, grid: Grid, patch_size: tuple[int, int]) -> None:
        super().__init__(grid, [patch_size])
        self.patch_area = patch_size[0] * patch_size[1]

    def to_map(self, x_BPNC: Tensor) -> Tensor:
        """The pixels as a channels-last map. Raises ValueError when they do not fill the grid."""
        return super().to_map(x_BPNC.unflatten(0, (-1, self.patch_area)).flatten(1, 2))

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as tokens (B * P, N, C)."""
        return super().to_tokens(map_BCHW).unflatten(1, (self.patch_area, -1)).flatten(0, 1)


class UnfoldedPixelMap(Layout):
    """As `UnfoldedPixels` but channels first, (B, C, P, N): MobileViT v2 (arXiv 2206.02680), which uses convolutions.

    Args:
        grid: the grid of the pixels.
        patch_size: height and width of a patch, in pixels.
    """

    def __init__(self, grid: Grid, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size

    def to_map(self, x_BCPN: Tensor) -> Tensor:
        """The pixels as a map (B, C, H, W). Raises ValueError when they do not fill the grid."""
        height, width = self.grid.size_for(x_BCPN.shape[2] * x_BCPN.shape[3])
        patch_height, patch_width = self.patch_size
        x = x_BCPN.unflatten(3, (height // patch_height, width // patch_width)).unflatten(2, self.patch_size)
        return x.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as (B, C, P, N)."""
        patch_height, patch_width = self.patch_size
        x = map_BCHW.unflatten(3, (-1, patch_width)).unflatten(2, (-1, patch_height))
        return x.permute(0, 1, 3, 5, 2, 4).flatten(4, 5).flatten(2, 3)


class WindowedTokens(Layout):
    """Windows of tokens (B, T, N, C), windows and tokens row by row, as in NesT (arXiv 2105.12723).

    Args:
        grid: the grid of the whole map.
        window_size: height and width of a window, in tokens.
    """

    def __init__(self, grid: Grid, window_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.window_size = window_size

    def to_map(self, x_BTNC: Tensor) -> Tensor:
        """The windows as one channels-last map. Raises ValueError when they do not fill the grid."""
        height, width = self.grid.size_for(x_BTNC.shape[1] * x_BTNC.shape[2])
        window_height, window_width = self.window_size
        x = x_BTNC.unflatten(2, self.window_size).unflatten(1, (height // window_height, width // window_width))
        return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as windows (B, T, N, C)."""
        window_height, window_width = self.window_size
        x = map_BCHW.permute(0, 2, 3, 1).unflatten(2, (-1, window_width)).unflatten(1, (-1, window_height))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
