"""Random numbers of each image that depend only on its key and on their position, as tensors for many images at once.

A generator's numbers depend on what was drawn before, so an image would get other ones in another batch. Here each is a
hash of the image's key and of the number's position: SplitMix64 (Steele, Lea and Flood 2014).
Integers wrap in the same way on all devices, so that the numbers of a CPU and of a GPU are the same.

Shapes: B images.
"""

import math

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)


def hashed(x: Tensor) -> Tensor:
    """SplitMix64's hash of each number: int64, which stands for the unsigned number with the same bits."""
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        x = _shifted(x, shift).bitwise_xor_(x).mul_(factor)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch fills with the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def combined(key: Tensor | int, number: Tensor) -> Tensor:
    """A key that depends on `key` and on each number: int64."""
    return hashed(key + (number + 1) * _STEP)


class ImageRandomness:
    """Draws the random numbers of some images. The same draws in the same order give an image the same numbers."""

    def __init__(self, keys_B: Tensor) -> None:
        """
        Args:
            keys_B: The key of each image, int64. The numbers are made on its device.
        """
        self._keys_B = keys_B
        self._drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) of shape (B, *shape), float32: multiples of 2**-24."""
        return _fraction(self._bits(*shape), 40)

    def below(self, limit: Tensor | int, *shape: int) -> Tensor:
        """Whole numbers from 0 to `limit` - 1 of shape (B, *shape), int64. The limit is at most 2**24."""
        return (self.uniform(*shape) * limit).long()

    def normal(self, *shape: int) -> Tensor:
        """Numbers of the standard normal distribution, of shape (B, *shape), float32 (Box and Muller 1958)."""
        bits = self._bits(*shape)
        radius = (1 - _fraction(bits, 40)).log_().mul_(-2).sqrt_()
        return radius.mul_(_fraction(bits, 16).mul_(2 * math.pi).cos_())

    def _bits(self, *shape: int) -> Tensor:
        """64 random bits each, of shape (B, *shape), int64."""
        count = math.prod(shape)
        positions = torch.arange(self._drawn, self._drawn + count, device=self._keys_B.device)
        self._drawn += count
        return combined(self._keys_B[:, None], positions).view(-1, *shape)


def _fraction(bits: Tensor, first: int) -> Tensor:
    """24 of the bits as the digits of a number in [0, 1), float32."""
    return (bits >> first).bitwise_and_(2**24 - 1) * 2.0**-24
