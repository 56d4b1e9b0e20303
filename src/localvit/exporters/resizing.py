"""Resizing and cropping inside a graph, exactly as evaluation does it with PIL.

PIL resizes the rows and the columns of 8-bit images, with weights of 22 fractional bits, and rounds to 8 bits after
each. Both are products with a matrix of weights, computed from the image's size. The weights are split into upper and
lower bits, so that float32 adds the products exactly. Only the rows and columns of the crop are computed.

Shapes: B batch, H and W height and width of the image, h and w those of the crop, in pixels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from localvit.data.preprocessing import Preprocessing


class ResizeAndCrop(nn.Module):
    """Images (B, 3, H, W) of values from 0 to 255, in float32, to (B, 3, h, w).

    Raises ValueError for other preprocessing than a center crop after bicubic or bilinear resizing.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        if preprocessing.crop_mode != "center" or preprocessing.interpolation not in _FILTERS:
            raise ValueError(
                f"resizing cannot be included for preprocessing with {preprocessing}: only for a center crop after "
                "bicubic or bilinear resizing"
            )
        self.crop_size = preprocessing.input_size
        self.resized_size = tuple(math.floor(side / preprocessing.crop_pct) for side in self.crop_size)
        self.columns_may_be_first = _pil_may_resize_columns_first()
        self.filter = _FILTERS[preprocessing.interpolation]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        device = images_BCHW.device
        rows_H, columns_W = (torch.arange(side, device=device) for side in images_BCHW.shape[2:])
        size = rows_H[-1] + 1, columns_W[-1] + 1
        resized = self._resized(*size)
        across_2wW = self._weights(columns_W, size[1], resized[1], self.crop_size[1])
        down_2hH = self._weights(rows_H, size[0], resized[0], self.crop_size[0])
        rows_first = _columns(_rows(images_BCHW, across_2wW), down_2hH)
        if not self.columns_may_be_first:
            return rows_first
        is_tall = (resized[0] < size[0]) & (size[0] - resized[0] > 2 * (size[1] - resized[1]))
        return torch.where(is_tall, _rows(_columns(images_BCHW, down_2hH), across_2wW), rows_first)

    def _resized(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width of the whole resized image, as timm's and torchvision's transforms compute them."""
        to_height, to_width = (torch.full_like(height, side) for side in self.resized_size)
        if self.resized_size[0] == self.resized_size[1]:
            short = torch.minimum(height, width)
            return to_height * height // short, to_width * width // short
        by_height = height * to_width <= width * to_height  # the side that is enlarged more, or reduced less
        return (
            torch.where(by_height, to_height, _round_half_to_even(height * to_width, width)),
            torch.where(by_height, _round_half_to_even(width * to_height, height), to_width),
        )

    def _weights(self, pixels_N: Tensor, side: Tensor, resized: Tensor, count: int) -> Tensor:
        """How much each of a side's pixels counts for each of the `count` pixels in the middle of the resized side.

        Returns the upper bits of all weights, and below them the lower bits: (2 * count, N), whole numbers.
        """
        begin = _round_half_to_even(resized - count, torch.full_like(resized, 2))
        kept_n = torch.arange(count, device=pixels_N.device) + begin
        weights_nN = _weights(kept_n, resized, pixels_N, side, *self.filter) * 2**_BITS
        weights_nN = torch.where(weights_nN < 0, (weights_nN - 0.5).ceil(), (weights_nN + 0.5).floor())
        upper_nN = (weights_nN / _LOWER + 0.5).floor()
        return torch.cat((upper_nN, weights_nN - upper_nN * _LOWER)).float()


def _rows(images_BCHW: Tensor, weights_2wW: Tensor) -> Tensor:
    return _rounded(*(images_BCHW @ weights_2wW.T).chunk(2, dim=3))


def _columns(images_BCHW: Tensor, weights_2hH: Tensor) -> Tensor:
    return _rounded(*(weights_2hH @ images_BCHW).chunk(2, dim=2))


@functools.cache
def _pil_may_resize_columns_first() -> bool:
    """Whether PIL resizes the columns of tall images before their rows, as newer versions do.

    They do if the height shrinks by more than twice as many pixels as the width. The rounding in between then differs.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (64, 16), dtype=np.uint8)
    image = Image.fromarray(pixels)
    at_once, *in_order = (
        np.asarray(each)
        for each in (
            image.resize((8, 32), _BICUBIC_PIL),
            image.resize((8, 64), _BICUBIC_PIL).resize((8, 32), _BICUBIC_PIL),
            image.resize((16, 32), _BICUBIC_PIL).resize((8, 32), _BICUBIC_PIL),
        )
    )
    return not np.array_equal(at_once, in_order[0]) and np.array_equal(at_once, in_order[1])


class ResampleByWeights(TorchFunctionMode):
    """Within it, antialiased bicubic interpolation of floating-point maps is a product with matrices of weights.

    Models resample their position embeddings with it. Runtimes have no operator for it, or one that differs. A map that
    has its new size already, which is not open, stays as it is: timm resamples it while torch exports.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("mode") == "bicubic" and kwargs.get("antialias"):
            size = kwargs.get("size", args[1] if len(args) > 1 else None)
            if isinstance(size, list | tuple) and not kwargs.get("align_corners") and args[0].is_floating_point():
                return args[0] if _is_size_of(args[0], size) else resample(args[0], *size)
        return func(*args, **kwargs)


def _is_size_of(map_BCHW: Tensor, size: Sequence[int | torch.SymInt]) -> bool:
    """Whether the map has this size at every input, as no side that is open has."""
    return all(isinstance(side, int) for side in size) and tuple(size) == tuple(map_BCHW.shape[2:])


def resample(map_BCHW: Tensor, height: int, width: int) -> Tensor:
    """A map (B, C, H, W) resampled to (B, C, h, w) as torch's antialiased bicubic interpolation does it."""
    down_hH, across_wW = (
        _weights(
            torch.arange(new, device=map_BCHW.device), new, torch.arange(old, device=map_BCHW.device), old, *_BICUBIC
        ).to(map_BCHW.dtype)
        for new, old in ((height, map_BCHW.shape[2]), (width, map_BCHW.shape[3]))
    )
    return down_hH @ map_BCHW @ across_wW.T


def _weights(
    kept_n: Tensor,
    resized: Tensor | int,
    pixels_N: Tensor,
    side: Tensor | int,
    filter: Callable[[Tensor], Tensor],
    support: float,
) -> Tensor:
    """How much each of a side's pixels counts for each pixel `kept_n` of the resized side: (n, N), in float64."""
    # The distance of the centers of two pixels, in pixels of whichever image has the larger ones.
    numerator_nN = (2 * kept_n[:, None] + 1) * side - (2 * pixels_N + 1) * resized
    larger = torch.maximum(torch.zeros_like(pixels_N[0]) + side, torch.zeros_like(pixels_N[0]) + resized)
    distance_nN = numerator_nN.abs().double() / (2 * larger).double()
    weights_nN = torch.where(distance_nN < support, filter(distance_nN), torch.zeros_like(distance_nN))
    return weights_nN / weights_nN.sum(1, keepdim=True)


_BITS = 22
"""Fractional bits of PIL's weights."""
_LOWER = 2**11
"""What the lower bits of a weight are less than; they are counted from -1024, and the upper ones up to 2048."""


def _rounded(upper: Tensor, lower: Tensor) -> Tensor:
    """The sum of products with both parts of the weights, rounded to 8 bits."""
    total = upper.double() * _LOWER + lower.double()
    return ((total + 2 ** (_BITS - 1)) / 2**_BITS).floor().clamp(0, 255).float()


def _round_half_to_even(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient of integers that are not negative, rounded as Python's `round` does."""
    quotient = numerator // denominator
    twice = 2 * (numerator - quotient * denominator)
    up = (twice > denominator) | ((twice == denominator) & (quotient % 2 == 1))
    return quotient + up.to(quotient.dtype)


def _bicubic(distance: Tensor) -> Tensor:
    """PIL's filter: that of Keys with a = -1/2."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far)


def _bilinear(distance: Tensor) -> Tensor:
    return 1 - distance


_BICUBIC_PIL = Image.Resampling.BICUBIC
_BICUBIC = (_bicubic, 2.0)
_FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {"bicubic": _BICUBIC, "bilinear": (_bilinear, 1.0)}
"""PIL's filters by name, each a function of the distance, and the distance from which it is zero."""
