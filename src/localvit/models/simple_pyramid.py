"""Maps of several strides from a plain vision transformer, whose blocks all work on one grid.

Exploring Plain Vision Transformer Backbones for Object Detection (ViTDet), arXiv 2203.16527, section 3, "Simple feature
pyramid": every map is computed from the last one of the transformer, without a top-down path.

Shapes: B batch, C channels of the transformer, D channels of the pyramid, H and W the patch grid.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn


class SimplePyramid(nn.Module):
    """A plain vision transformer as a backbone for detection and segmentation.

    Takes images (B, in_chans, H', W') and returns a list of maps (B, D, H, W), from the smallest stride to the largest:
    for patches of 16 pixels those of strides 4, 8, 16 and 32. Like the models of timm's `features_only`, it has
    `feature_info` with `channels()` and `reduction()`.

    A map of twice the resolution is a 2 x 2 transposed convolution with stride 2 of the last map; of four times, two of
    them with LayerNorm and GELU between; of half, a 2 x 2 maximum. Then follow a 1 x 1 and a 3 x 3 convolution, each
    with a LayerNorm over the channels.

    Args:
        model: a plain model of this package (LocalViT-T and -S, TNT, T2T) or of timm, localized or not. It is used as
            it is, and its classifier is removed, since nothing would train it.
        channels: D.
        strides: of the maps in pixels, ascending; by default a quarter of a patch, a half, one and two, as far as these
            are whole numbers. Four patches are possible too.

    Raises:
        ValueError: for a model with several strides of its own, or a stride that cannot be had.
    """

    def __init__(self, model: nn.Module, channels: int = 256, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        transformer: Any = model
        patch, dim = _stride_and_width(transformer)
        possible = [patch // part for part in (4, 2) if patch % part == 0] + [patch, 2 * patch, 4 * patch]
        chosen = possible[:-1] if strides is None else list(strides)
        if not chosen or sorted(set(chosen)) != chosen or not set(chosen) <= set(possible):
            raise ValueError(
                f"strides={chosen} cannot be had from patches of {patch} pixels: choose some of "
                f"{', '.join(map(str, possible))}, in ascending order"
            )
        transformer.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        self.model = transformer
        self.levels = nn.ModuleList(_level(dim, channels, patch / stride) for stride in chosen)
        infos = [
            {"num_chs": channels, "reduction": stride, "module": f"levels.{index}", "index": index}
            for index, stride in enumerate(chosen)
        ]
        self.feature_info = FeatureInfo(infos, tuple(range(len(chosen))))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> list[Tensor]:
        [map_BCHW] = self.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        return [level(map_BCHW) for level in self.levels]


def _level(dim: int, channels: int, scale: float) -> nn.Sequential:
    """The layers of a map with `scale` times the resolution of the patch grid."""
    layers: list[nn.Module] = []
    width = dim
    while scale > 1:
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width, scale = width // 2, scale / 2
    if scale < 1:
        layers.append(nn.MaxPool2d(round(1 / scale), ceil_mode=True))  # a window of its own for what remains
    layers += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*layers)


def _stride_and_width(model: Any) -> tuple[int, int]:
    """Stride in pixels and channels of all the model's maps. Raises ValueError if they differ, or are not known."""
    kind = type(model).__name__
    infos = getattr(model, "feature_info", None)
    if not isinstance(infos, list) or not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{kind} does not return its maps: use a vision transformer of this package or of timm")
    strides = {info["reduction"] for info in infos}
    if len(strides) > 1:
        raise ValueError(
            f"{kind} has maps of strides {', '.join(map(str, sorted(strides)))} already: make it with "
            "timm.create_model(..., features_only=True)"
        )
    return int(infos[-1]["reduction"]), int(infos[-1]["num_chs"])
