"""Resizing and cropping an image in one step, where the resized image would be too large to hold.

An image of 60,000 x 1 pixels that is resized to a short side of 256 pixels has 4 billion, of which a crop keeps 50,000.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms
from torchvision.transforms.functional import pil_modes_mapping

LARGEST = 2**24
"""Pixels of the resized image above which only the part that is kept is computed. It is not reached by images with an
aspect ratio below 250 that are resized to a short side of 256 pixels."""
_REACH = 4
"""Pixels of the image, or of the resized image if that is smaller, on which a resized pixel depends to either side."""


class ResizedCrop:
    """`crop(resize(image))`, of PIL images. Above `LARGEST`, values may differ by 1 of 255, because of rounding."""

    def __init__(
        self, resize: transforms.Resize | ResizeKeepRatio, crop: transforms.CenterCrop | transforms.RandomCrop
    ) -> None:
        """
        Args:
            resize: Resizes to a short side, with the aspect ratio kept.
            crop: Center crop not larger than that, or random crop; the padding of a random crop is a number.
        """
        self.resize = resize
        self.crop = crop

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.resize}, {self.crop})"

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self._resized_size(image)
        if height * width <= LARGEST:
            return self.crop(self.resize(image))
        top, left = self._position(height, width)
        return resize_window(
            image, (height, width), (top, left, *self.crop.size), pil_modes_mapping[self.resize.interpolation]
        )

    def _resized_size(self, image: Image.Image) -> Sequence[int]:
        """Height and width of `resize(image)`."""
        if isinstance(self.resize, ResizeKeepRatio):
            return self.resize.get_params(image, self.resize.size, self.resize.longest)
        if not isinstance(self.resize.size, int):
            return self.resize.size
        short = min(image.size)
        return [int(self.resize.size * side / short) for side in (image.height, image.width)]

    def _position(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the crop in a resized image of this size. Draws the random numbers that `crop` would."""
        crop = self.crop
        if isinstance(crop, transforms.CenterCrop):
            return round((height - crop.size[0]) / 2), round((width - crop.size[1]) / 2)
        pad = crop.padding
        pad_y, pad_x = (
            pad + max(0, own - side - 2 * pad) for own, side in zip(crop.size, (height, width), strict=True)
        )
        padded = torch.empty(1, height + 2 * pad_y, width + 2 * pad_x, device="meta")
        top, left, _, _ = crop.get_params(padded, crop.size)
        return top - pad_y, left - pad_x


def resize_window(
    image: Image.Image, size: Sequence[int], window: tuple[int, int, int, int], resample: int
) -> Image.Image:
    """Part of an image resized to `size` (height and width), without computing the rest. Outside of it is black.

    Args:
        image: The image.
        size: Height and width of the whole resized image.
        window: Top, left, height and width of the part.
        resample: PIL's filter.
    """
    top, left, height, width = window
    across = _Span.of(left, width, size[1], image.width)
    down = _Span.of(top, height, size[0], image.height)
    part = image.crop((across.first, down.first, across.last, down.last))
    box = (across.start, down.start, across.end, down.end)
    resized = part.resize((across.count, down.count), resample, box=box)
    x, y = across.begin - left, down.begin - top
    return resized.crop((-x, -y, width - x, height - y))


@dataclass(frozen=True)
class _Span:
    """Along one side: the pixels of the resized image that a window shows, and those of the image they depend on."""

    begin: int
    """First pixel of the resized image."""
    count: int
    first: int
    """First pixel of the image."""
    last: int
    """The pixel after the last one."""
    start: float
    """Where the shown part starts, in pixels of the image, from `first`."""
    end: float

    @classmethod
    def of(cls, begin: int, count: int, resized: int, side: int) -> "_Span":
        """The span of a window from `begin` with `count` pixels, where a side was `resized` from `side` pixels."""
        scale = side / resized
        shown = range(max(begin, 0), min(begin + count, resized))
        reach = _REACH * max(scale, 1)
        first = max(0, math.floor(shown.start * scale - reach))
        last = min(side, math.ceil(shown.stop * scale + reach))
        # Positions count from the cut, because PIL stores them in float32.
        return cls(
            begin=shown.start,
            count=len(shown),
            first=first,
            last=last,
            start=shown.start * scale - first,
            end=min(shown.stop * scale - first, last - first),
        )
