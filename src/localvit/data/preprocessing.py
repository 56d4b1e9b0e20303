"""How images are prepared for evaluation. A checkpoint stores these settings."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision import transforms

from localvit.data.resized_crop import ResizedCrop


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resizing, cropping and normalization of images for a model."""

    input_size: tuple[int, int] = (224, 224)
    """Height and width of the model's input, in pixels."""
    crop_pct: float = 224 / 256
    """Side of the crop divided by the short side of the resized image."""
    crop_mode: str = "center"
    """`center`, `squash` or `border`, as in timm."""
    interpolation: str = "bicubic"
    """PIL's filter for resizing: `bicubic`, `bilinear`, ..."""
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    """Mean of each channel, for values in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    """Standard deviation of each channel, for values in [0, 1]."""

    def __post_init__(self) -> None:
        if min(self.input_size) < 1:
            raise ValueError(f"input_size={self.input_size} must be at least 1 x 1")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct} must be in (0, 1]")

    @classmethod
    def published(cls, input_size: tuple[int, int]) -> "Preprocessing":
        """The published preprocessing: the same for every model, without a resizing margin for inputs of at most 32."""
        return cls(input_size=input_size, crop_pct=1.0 if max(input_size) <= 32 else 224 / 256)

    @classmethod
    def from_pretrained_cfg(cls, cfg: dict[str, Any], input_size: tuple[int, int] | None = None) -> "Preprocessing":
        """The settings in a timm model's `pretrained_cfg`, for its own or another input size (height and width)."""
        return cls(
            input_size=tuple(input_size or cfg["input_size"][1:]),
            crop_pct=cfg.get("crop_pct") or 224 / 256,
            crop_mode=cfg.get("crop_mode") or "center",
            interpolation=cfg.get("interpolation") or "bicubic",
            mean=tuple(cfg.get("mean") or IMAGENET_DEFAULT_MEAN),
            std=tuple(cfg.get("std") or IMAGENET_DEFAULT_STD),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`; also accepts what JSON made of it (lists instead of tuples)."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return asdict(self)

    def transform(self) -> transforms.Compose:
        """timm's evaluation transform: from a PIL image to a normalized float32 tensor (3, H, W)."""
        steps = create_transform(
            (3, *self.input_size),
            is_training=False,
            use_prefetcher=False,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        ).transforms
        if isinstance(steps[1], transforms.CenterCrop):
            steps[:2] = [ResizedCrop(*steps[:2])]
        return transforms.Compose(steps)

    def resizing(self) -> transforms.Compose:
        """The part of `transform` from image to image: resizing and cropping to `input_size`."""
        return transforms.Compose(
            list(takewhile(lambda step: not isinstance(step, MaybeToTensor), self.transform().transforms))
        )

    def normalized(self, image_BCHW: Tensor) -> Tensor:
        """Images of bytes (B, C, H, W) as `transform` gives them after resizing: float32, on the same device."""
        return normalized(image_BCHW, self.mean, self.std)

    def __str__(self) -> str:
        height, width = self.input_size
        return f"{height} x {width}, {self.interpolation}, {self.crop_mode} crop {self.crop_pct:.3f}"


def normalized(image_BCHW: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Images of bytes (B, C, H, W) as float32, bit-exact as torchvision converts and normalizes them one by one."""
    mean_C, std_C = (torch.as_tensor(each, dtype=torch.float32, device=image_BCHW.device) for each in (mean, std))
    return image_BCHW.float().div_(255).sub_(mean_C[:, None, None]).div_(std_C[:, None, None])


class WholeImages(Preprocessing):
    """Preprocessing that the model does itself: it is given each image as it is, of any size."""

    def transform(self) -> transforms.Compose:
        """From a PIL image to its pixels (3, H, W), uint8."""
        return transforms.Compose([transforms.PILToTensor()])
