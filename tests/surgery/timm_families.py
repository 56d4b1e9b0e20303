"""The families of timm, small: one row each, and one more for each kind of block that has a rule of its own.

Images are the smallest that make patch grids of different height and width, of primes where the model allows it.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from checks import randomized
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

PLAIN = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 4}
MAXVIT = {"embed_dim": (32, 64, 64, 64), "depths": (1, 1, 1, 1), "stem_width": 16}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A family, or a kind of block that it may have."""

    family: str
    variant: str = ""
    """What sets it apart from the family's first row."""
    name: str
    """Of an entry point of timm, or of the class where the entry points fix the depth."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (48, 80)
    """Height and width of the images; these are 3 x 5 patches of 16."""
    told_size: bool = True
    """Whether the constructor takes `img_size`."""
    any_size: bool = False
    """Whether it takes images of other sizes too."""
    sites: int
    """Feed-forwards that see patches, by the depths."""
    reach: int | None = 0
    """How many patches away a change of a pixel reaches through the convolutions before the first site; None where
    norms or pooling spread it over the whole map."""
    refused: str = ""
    """Part of the reason why `Replace` is refused; empty if it is not."""
    shared_drop_path: bool = False
    """Whether the one stochastic depth of a block serves its attention too."""

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}" if self.variant else self.family


ROWS = [
    Row(family="beit", name="beit_base_patch16_224", kwargs=PLAIN, sites=2),
    Row(family="cait", name="cait_xxs24_224", kwargs=PLAIN, sites=2, shared_drop_path=True),
    Row(
        family="convit",
        name="convit_tiny",
        kwargs={"embed_dim": 12, "num_heads": 4, "depth": 3, "local_up_to_layer": 2},
        size=(48, 48),  # Its attention takes every grid to be square.
        sites=3,
        shared_drop_path=True,
    ),
    Row(
        family="csatv2",
        name="csatv2",
        kwargs={"dims": (16, 24, 32, 40), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
        size=(128, 192),
        told_size=False,
        any_size=True,
        sites=4 + 2,  # One in each convolutional block's attention, one in each transformer block.
        reach=None,
    ),
    Row(
        family="davit",
        name="davit_tiny",
        kwargs={"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 40), "num_heads": (2, 2, 2, 2)},
        size=(96, 160),
        told_size=False,
        any_size=True,
        sites=2 * 4,
        reach=3,  # A 7x7 stem, two 3x3 convolutions.
    ),
    Row(family="deepseek_vit", name="deepseek_vit_412m", kwargs=PLAIN, size=(42, 70), any_size=True, sites=2),
    Row(family="deit", name="deit_tiny_patch16_224", kwargs=PLAIN, sites=2),
    Row(family="deit", variant="distilled", name="deit_tiny_distilled_patch16_224", kwargs=PLAIN, sites=2),
    Row(
        family="edgenext",
        name="edgenext_xx_small",
        kwargs={"depths": (1, 1, 1, 1)},
        size=(96, 160),
        told_size=False,
        any_size=True,
        sites=3,  # The first stage has none.
        reach=2,  # 3x3 convolutions at strides 4 and 8.
        refused="adds the feed-forward's output to the block's input",
    ),
    Row(family="eva", name="eva02_tiny_patch14_224", kwargs=PLAIN, size=(42, 70), sites=2),
    Row(
        family="eva",
        variant="dinov3",
        name="vit_small_patch16_dinov3",
        kwargs=PLAIN | {"dynamic_img_size": True},
        any_size=True,
        sites=2,
    ),
    Row(
        family="eva",
        variant="post-norm",
        name="eva02_tiny_patch14_224",
        kwargs=PLAIN | {"use_post_norm": True, "scale_mlp": False},
        size=(42, 70),
        sites=2,
    ),
    Row(
        family="gcvit",
        name="GlobalContextVit",
        kwargs={"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2), "embed_dim": 8},
        size=(64, 96),
        sites=1 + 1 + 2 + 1,
        reach=1,
    ),
    Row(
        family="hieradet_sam2",
        name="sam2_hiera_tiny",
        kwargs={"embed_dim": 16, "stages": (1, 2, 1, 1), "global_att_blocks": (2,)},
        size=(64, 96),
        told_size=False,
        any_size=True,
        sites=1 + 2 + 1 + 1,
        reach=1,
    ),
    Row(family="maxxvit", name="coatnet_pico_rw_224", kwargs=MAXVIT, size=(96, 160), sites=1 + 1, reach=1),
    Row(
        family="maxxvit",
        variant="maxvit",
        name="maxvit_pico_rw_256",
        kwargs=MAXVIT,
        size=(64, 96),
        sites=2 * 4,
        reach=1,
    ),
    Row(
        family="maxxvit",
        variant="channels first",
        name="maxvit_pico_rw_256",
        kwargs=MAXVIT | {"transformer_use_nchw_attn": True},
        size=(64, 96),
        sites=2 * 4,
        reach=1,
    ),
    Row(
        family="maxxvit",
        variant="parallel",
        name="maxvit_pico_rw_256",
        kwargs=MAXVIT | {"embed_dim": (64, 64, 64, 64), "block_type": ("PM",) * 4},
        size=(64, 96),
        sites=4,
        reach=2,
    ),
    Row(family="qwen3_vit", name="qwen3_vit_88m", kwargs=PLAIN, any_size=True, sites=2),
    Row(family="swin_transformer", name="swin_tiny_patch4_window7_224", kwargs=SWIN, size=(64, 96), sites=4),
    Row(family="swin_transformer_v2", name="swinv2_tiny_window8_256", kwargs=SWIN, size=(64, 96), sites=4),
    Row(family="swin_transformer_v2_cr", name="swinv2_cr_tiny_224", kwargs=SWIN, size=(64, 96), sites=4),
    Row(
        family="tiny_vit",
        name="tiny_vit_5m_224",
        kwargs={"embed_dims": (16, 24, 32, 40), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        size=(96, 160),
        told_size=False,
        any_size=True,
        sites=3,  # The first stage is of convolutions.
        reach=2,
    ),
    Row(
        family="tnt",
        name="tnt_s_patch16_224",
        kwargs={"embed_dim": 48, "depth": 2},
        sites=2,
        shared_drop_path=True,
    ),
    Row(
        family="vision_transformer",
        name="vit_tiny_patch16_224",
        kwargs=PLAIN | {"dynamic_img_size": True},
        any_size=True,
        sites=2,
    ),
    Row(
        family="vision_transformer",
        variant="registers, SwiGLU, layer scale",
        name="vit_giant_patch14_reg4_dinov2",
        kwargs=PLAIN,
        size=(42, 70),
        sites=2,
    ),
    Row(
        family="vision_transformer",
        variant="ResPostBlock",
        name="vit_tiny_patch16_224",
        kwargs=PLAIN | {"block_fn": ResPostBlock, "init_values": 1.0},
        sites=2,
    ),
    Row(
        family="vision_transformer",
        variant="ParallelScalingBlock",
        name="vit_tiny_patch16_224",
        kwargs=PLAIN | {"block_fn": ParallelScalingBlock},
        sites=2,
        refused="shares its norm and its first projection with the attention",
    ),
    Row(
        family="vision_transformer",
        variant="ParallelThingsBlock",
        name="vit_tiny_patch16_224",
        kwargs=PLAIN | {"block_fn": ParallelThingsBlock, "init_values": 1.0},
        sites=2 * 2,
        reach=None,  # The attention is not in the block of the site.
    ),
    Row(
        family="vision_transformer_hybrid",
        name="vit_tiny_r_s16_p8_224",
        kwargs=PLAIN,
        size=(96, 160),
        sites=2,
        reach=None,
    ),
    Row(family="vision_transformer_relpos", name="vit_relpos_base_patch16_cls_224", kwargs=PLAIN, sites=2),
    Row(
        family="vision_transformer_sam",
        name="samvit_base_patch16_224",
        kwargs=PLAIN | {"window_size": 2, "neck_chans": 16},
        any_size=True,
        sites=2,
    ),
    Row(
        family="vitamin",
        name="vitamin_small_224",
        kwargs={"depth": 2},
        size=(96, 160),
        sites=2,
        reach=3,  # Nine 3x3 convolutions, the last four at stride 8.
    ),
    Row(
        family="volo",
        name="VOLO",
        kwargs={"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 3, 3, 3)},
        sites=4,
        reach=1,
    ),
    Row(
        family="xcit",
        name="xcit_nano_12_p8_224",
        kwargs={"embed_dim": 48, "depth": 2},
        size=(56, 88),
        any_size=True,
        sites=2,
        reach=3,  # The stem, then two 3x3 convolutions.
    ),
]


class Features(nn.Module):
    """Returns all tokens of a model, whose head may read the class token only, which does not depend on every site."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(image_BCHW)


def make(row: Row, **kwargs: Any) -> Features:
    if not hasattr(timm.models, row.name):
        pytest.skip(f"timm {timm.__version__} has no {row.name}")
    if row.told_size:
        kwargs["img_size"] = row.size
    torch.manual_seed(0)
    return randomized(Features(getattr(timm.models, row.name)(**row.kwargs | kwargs)))


def images(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
