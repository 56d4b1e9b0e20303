"""Random augmentation of many images at once, with the distribution of a transform for one image.

What happens to an image depends on its key only (`localvit.data.image_randomness`): not on the images beside it, and
not on a generator. Random numbers are drawn on the CPU, pixels are computed on the device of the images.

Shapes: B images, C = 3 channels, H and W pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision import transforms

from localvit.data import image_operations
from localvit.data.image_randomness import ImageRandomness, combined
from localvit.data.preprocessing import normalized
from localvit.data.resized_crop import ResizedCrop

_ATTEMPTS = 10
"""How often timm tries to find a rectangle to erase that is smaller than the image."""
_PLACES, _NOISE = 1, 2
"""Distinguish the keys for erasing, which only some images need, from those for all other random numbers."""

_Step = Callable[[Tensor, ImageRandomness], Tensor]


class BatchAugmentation:
    """A random transform of images of one size."""

    def __init__(self, transform: Any) -> None:
        """
        Args:
            transform: The transform for one image, as `localvit.train.augmentation.augmentation` composes it: padded
                random crop, horizontal flip, RandAugment or color jitter, normalization, random erasing.

        Raises:
            ValueError: A step has no form for many images. The message names it.
        """
        self._on_bytes: list[_Step] = []
        self._erase: _Erasing | None = None
        steps = list(transform.transforms)
        flips = [step for step in steps if isinstance(step, transforms.RandomHorizontalFlip)]
        for step in steps:
            if isinstance(step, ResizedCrop) and isinstance(step.crop, transforms.RandomCrop):
                self._on_bytes.append(_PaddedCrop(step.crop, flips[0].p if flips else 0.0))
            elif isinstance(step, RandAugment):
                self._on_bytes.append(_RandomOperations(step))
            elif isinstance(step, transforms.ColorJitter) and step.hue is None:
                self._on_bytes.append(_ColorJitter(step))
            elif isinstance(step, transforms.Normalize):
                self._mean, self._std = step.mean, step.std
            elif isinstance(step, RandomErasing):
                self._erase = _Erasing(step)
            elif not isinstance(step, MaybeToTensor | transforms.ToTensor | transforms.RandomHorizontalFlip):
                raise ValueError(f"{type(step).__name__} has no form for many images at once")

    def __call__(self, image_BCHW: Tensor, keys_B: Tensor, is_erasable_B: Tensor | None = None) -> Tensor:
        """Augment images.

        Args:
            image_BCHW: Bytes (uint8), on any device.
            keys_B: The key of each image, int64, on the CPU.
            is_erasable_B: Images that may be erased, bool, on the CPU; None for all.

        Returns:
            Normalized images, float32.
        """
        randomness = ImageRandomness(keys_B)
        for step in self._on_bytes:
            image_BCHW = step(image_BCHW, randomness)
        image_BCHW = normalized(image_BCHW, self._mean, self._std)
        return self._erase(image_BCHW, randomness, keys_B, is_erasable_B) if self._erase else image_BCHW


class _PaddedCrop:
    """torchvision's random crop with black padding, and a random horizontal flip."""

    def __init__(self, crop: transforms.RandomCrop, flip_probability: float) -> None:
        self.size: tuple[int, int] = tuple(crop.size)
        self.padding = crop.padding
        self.flip_probability = flip_probability

    def __call__(self, image_BCHW: Tensor, randomness: ImageRandomness) -> Tensor:
        device = image_BCHW.device
        starts = []
        for side, wanted in zip(image_BCHW.shape[2:], self.size, strict=True):
            padding = self.padding + max(0, wanted - side - 2 * self.padding)
            starts.append((randomness.below(side + 2 * padding - wanted + 1) - padding).to(device))
        is_flipped_B = (randomness.uniform() < self.flip_probability).to(device)
        top_B, left_B = starts
        return image_operations.crop(image_BCHW, top_B, left_B, self.size, is_flipped_B)


def _enhanced(level_B: Tensor, sign_B: Tensor) -> Tensor:
    return level_B * 1.8 + 0.1


def _enhanced_increasing(level_B: Tensor, sign_B: Tensor) -> Tensor:
    return (1 + sign_B * level_B * 0.9).clamp(min=0.1)


def _bits(level_B: Tensor) -> Tensor:
    return (level_B * 4).floor()


def _threshold(level_B: Tensor) -> Tensor:
    return (level_B * 256).floor().clamp(max=256)


_PIXELWISE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "AutoContrast": (image_operations.auto_contrast, lambda level, sign: level),
    "Equalize": (image_operations.equalize, lambda level, sign: level),
    "Invert": (image_operations.invert, lambda level, sign: level),
    "Posterize": (image_operations.posterize, lambda level, sign: _bits(level)),
    "PosterizeIncreasing": (image_operations.posterize, lambda level, sign: (4 - _bits(level)).clamp(min=0)),
    "PosterizeOriginal": (image_operations.posterize, lambda level, sign: (4 + _bits(level)).clamp(max=8)),
    "Solarize": (image_operations.solarize, lambda level, sign: _threshold(level)),
    "SolarizeIncreasing": (image_operations.solarize, lambda level, sign: 256 - _threshold(level)),
    "SolarizeAdd": (image_operations.solarize_add, lambda level, sign: (level * 110).floor().clamp(max=128)),
    "Desaturate": (image_operations.color, lambda level, sign: 1 - (0.5 + 0.5 * level).clamp(0.5, 1)),
    **{
        name + suffix: (operation, argument)
        for name, operation in (
            ("Color", image_operations.color),
            ("Contrast", image_operations.contrast),
            ("Brightness", image_operations.brightness),
            ("Sharpness", image_operations.sharpness),
        )
        for suffix, argument in (("", _enhanced), ("Increasing", _enhanced_increasing))
    },
}
"""timm's operations on colors: the function, and its argument from the level (1 for magnitude 10) and a random sign."""


def _matrix_23(name: str, level_B: Tensor, sizes: Sequence[int], hparams: dict[str, Any]) -> Tensor:
    """The affine map (B, 2, 3) of one of timm's geometric operations, from a level with a sign."""
    height, width = sizes
    one, zero = torch.ones_like(level_B), torch.zeros_like(level_B)
    rows = {"x": [one, zero, zero], "y": [zero, one, zero]}
    if name == "Rotate":
        angle_B = -torch.deg2rad(30 * level_B)
        cos, sin = angle_B.cos(), angle_B.sin()
        x, y = width / 2, height / 2
        rows = {"x": [cos, sin, x - cos * x - sin * y], "y": [-sin, cos, y + sin * x - cos * y]}
    elif name.startswith("Shear"):
        rows[name[-1].lower()]["YX".index(name[-1])] = 0.3 * level_B
    else:
        side = width if name.startswith("TranslateX") else height
        share = hparams.get("translate_pct", 0.45) * side if name.endswith("Rel") else hparams["translate_const"]
        rows[name[9].lower()][2] = share * level_B
    return torch.stack([torch.stack(row, 1) for row in rows.values()], 1)


_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


class _RandomOperations:
    """timm's RandAugment (arXiv 1909.13719): a few random operations per image. Positions are sampled bilinearly."""

    def __init__(self, policy: RandAugment) -> None:
        self.operations = list(policy.ops)
        self.num_layers = policy.num_layers
        unknown = [each.name for each in self.operations if each.name not in (*_PIXELWISE, *_GEOMETRIC)]
        if unknown or policy.choice_weights is not None:
            raise ValueError(f"RandAugment with {', '.join(unknown) or 'weights'} has no form for many images at once")

    def __call__(self, image_BCHW: Tensor, randomness: ImageRandomness) -> Tensor:
        image_BCHW = image_BCHW.clone()
        for _ in range(self.num_layers):
            self._apply_one_each(image_BCHW, randomness)
        return image_BCHW

    def _apply_one_each(self, image_BCHW: Tensor, randomness: ImageRandomness) -> None:
        """Apply an operation to each image, in place."""
        example = self.operations[0]
        choice_B = randomness.below(len(self.operations))
        choice_B = torch.where(randomness.uniform() < example.prob, choice_B, -1)
        sign_B = torch.where(randomness.uniform() < 0.5, -1.0, 1.0)
        level_B = _magnitudes(example, randomness).double() / 10
        warped, matrices = [], []
        for number, operation in enumerate(self.operations):
            rows = (choice_B == number).nonzero().flatten()
            level, sign = level_B[rows], sign_B[rows]
            if operation.name in _GEOMETRIC:
                warped.append(rows)
                matrices.append(_matrix_23(operation.name, level * sign, image_BCHW.shape[2:], operation.hparams))
            elif len(rows):
                function, argument = _PIXELWISE[operation.name]
                _apply(function, image_BCHW, rows, argument(level, sign))
        if warped and len(rows := torch.cat(warped)):
            fill = torch.tensor(example.kwargs["fillcolor"], dtype=torch.uint8, device=image_BCHW.device)
            _apply(
                lambda images, matrix: image_operations.warp(images, matrix, fill),
                image_BCHW,
                rows,
                torch.cat(matrices),
            )


def _magnitudes(operation: Any, randomness: ImageRandomness) -> Tensor:
    """The magnitude of an operation for each image, as timm draws it."""
    std, magnitude_B = operation.magnitude_std, randomness.uniform() * operation.magnitude
    normal_B = randomness.normal()
    if std != math.inf:
        magnitude_B = operation.magnitude + std * normal_B
    return magnitude_B.clamp(0, operation.magnitude_max or 10)


def _apply(function: Callable[[Tensor, Tensor], Tensor], image_BCHW: Tensor, rows: Tensor, argument: Tensor) -> None:
    """Replace the images of some rows by the results of a function."""
    device = image_BCHW.device
    rows, argument = rows.to(device), argument.float().to(device)
    image_BCHW.index_copy_(0, rows, function(image_BCHW.index_select(0, rows), argument))


class _ColorJitter:
    """torchvision's random brightness, contrast and saturation, in random order."""

    def __init__(self, jitter: transforms.ColorJitter) -> None:
        parts = (
            (image_operations.brightness, jitter.brightness),
            (image_operations.contrast, jitter.contrast),
            (image_operations.color, jitter.saturation),
        )
        self.parts = [(function, limits) for function, limits in parts if limits is not None]

    def __call__(self, image_BCHW: Tensor, randomness: ImageRandomness) -> Tensor:
        if not self.parts:
            return image_BCHW
        image_BCHW = image_BCHW.clone()
        order_BN = randomness.uniform(len(self.parts)).argsort(1)
        factor_BN = randomness.uniform(len(self.parts))
        for place in range(len(self.parts)):
            for number, (function, (least, most)) in enumerate(self.parts):
                rows = (order_BN[:, place] == number).nonzero().flatten()
                if len(rows):
                    _apply(function, image_BCHW, rows, least + (most - least) * factor_BN[rows, number])
        return image_BCHW


@dataclass(frozen=True)
class _Rectangles:
    """Up to N rectangles per image: their first pixel and the pixel after the last one; empty where there is none."""

    begin_BN2: Tensor
    end_BN2: Tensor

    def mask(self, number: int, size: Sequence[int], device: torch.device) -> Tensor:
        """Whether a pixel is in rectangle `number` of its image (B, 1, H, W)."""
        inside = []
        for side in range(2):
            pixel = torch.arange(size[side], device=device)
            begin, end = (each[:, number, side, None].to(device) for each in (self.begin_BN2, self.end_BN2))
            inside.append((pixel >= begin) & (pixel < end))
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


class _Erasing:
    """timm's random erasing (arXiv 1708.04896)."""

    def __init__(self, erasing: RandomErasing) -> None:
        self.settings = erasing

    def __call__(
        self, image_BCHW: Tensor, randomness: ImageRandomness, keys_B: Tensor, is_erasable_B: Tensor | None
    ) -> Tensor:
        is_erased_B = randomness.uniform() < self.settings.probability
        if is_erasable_B is not None:
            is_erased_B &= is_erasable_B
        rows = is_erased_B.nonzero().flatten()
        if not len(rows):
            return image_BCHW
        size, device = image_BCHW.shape[2:], image_BCHW.device
        places, noise = (combined(keys_B[rows], torch.tensor(purpose)) for purpose in (_PLACES, _NOISE))
        rectangles = self._rectangles(ImageRandomness(places), size[0], size[1])
        noise_randomness = ImageRandomness(noise.to(device))
        rows = rows.to(device)
        erased = image_BCHW.index_select(0, rows)
        for number in range(self.settings.max_count):
            fill = self._fill(noise_randomness, image_BCHW.shape)
            erased = torch.where(rectangles.mask(number, size, device), fill, erased)
        return image_BCHW.index_copy_(0, rows, erased)

    def _rectangles(self, randomness: ImageRandomness, height: int, width: int) -> _Rectangles:
        settings = self.settings
        most = settings.max_count
        count_B1 = (settings.min_count + randomness.below(most - settings.min_count + 1))[:, None]
        shape = (most, _ATTEMPTS)
        area_BNA = settings.min_area + (settings.max_area - settings.min_area) * randomness.uniform(*shape)
        area_BNA = area_BNA * (height * width) / count_B1[..., None]
        low, high = settings.log_aspect_ratio
        aspect_BNA = (low + (high - low) * randomness.uniform(*shape)).exp()
        sides_BNA2 = torch.stack(((area_BNA * aspect_BNA).sqrt(), (area_BNA / aspect_BNA).sqrt()), 3).round().long()
        fits_BNA = (sides_BNA2[..., 0] < height) & (sides_BNA2[..., 1] < width)
        first_BN11 = fits_BNA.int().argmax(2)[..., None, None]
        sides_BN2 = sides_BNA2.gather(2, first_BN11.expand(-1, -1, 1, 2)).squeeze(2)
        exists_BN = fits_BNA.any(2) & (torch.arange(most) < count_B1)
        sides_BN2 = sides_BN2 * exists_BN[..., None]
        begin_BN2 = randomness.below(torch.tensor([height, width]) - sides_BN2 + 1, most, 2)
        return _Rectangles(begin_BN2, begin_BN2 + sides_BN2)

    def _fill(self, noise: ImageRandomness, shape: Sequence[int]) -> Tensor:
        if self.settings.per_pixel:
            return noise.normal(*shape[1:])
        return noise.normal(shape[1], 1, 1) if self.settings.rand_color else noise.uniform(1, 1, 1) * 0
