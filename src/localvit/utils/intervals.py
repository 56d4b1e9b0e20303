"""How precisely a number of images tells an accuracy."""

import math

QUANTILE = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def accuracy_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy in percent that was measured on `num_images` images, in percent.

    It is Wilson's score interval (1927), which holds for few images and near 0 and 100 too.
    """
    z, share = QUANTILE, accuracy / 100
    center = share + z**2 / (2 * num_images)
    half = z * math.sqrt(share * (1 - share) / num_images + z**2 / (4 * num_images**2))
    low, high = ((center + sign * half) / (1 + z**2 / num_images) for sign in (-1, 1))
    return max(100 * low, 0.0), min(100 * high, 100.0)


def interval_text(accuracy: float, num_images: int) -> str:
    """The interval of `accuracy_interval` for a person, without the unit: one decimal, two for 1,000 images or more."""
    digits = 1 if num_images < 1000 else 2
    low, high = accuracy_interval(accuracy, num_images)
    return f"{low:.{digits}f} to {high:.{digits}f}"
