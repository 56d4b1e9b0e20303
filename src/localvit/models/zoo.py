"""The published models as facts: names, files and the numbers that they are known by; and making any model by name."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

from localvit.models.registry import RELEASE
from localvit.surgery.localize import localize_with_options


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One model of the paper. Accuracies are of the raw weights on the 50,000 images of ImageNet-1k val."""

    name: str
    """Published name."""
    friendly: str | None
    """Another name for it."""
    paper_name: str
    """What the paper calls it."""
    parameters: int
    """Number of parameters, frozen ones included."""
    file: str | None = None
    """The released file under tag v1.0.0, if there is one. No checksum was published."""
    acc1: float | None = None
    """Published Acc@1 in percent."""
    acc5: float | None = None
    """Published Acc@5 in percent."""
    loss: float | None = None
    """Published loss in nats (a mean of batch means)."""

    @property
    def url(self) -> str | None:
        """Where the released file is."""
        return RELEASE + self.file if self.file else None


ZOO = (
    PublishedModel(
        name="localvit_tiny_mlp4_act3_r192",
        friendly="localvit_tiny",
        paper_name="LocalViT-T",
        parameters=5_908_696,
        file="localvit_t.pth",
        acc1=74.838,
        acc5=92.610,
        loss=1.211,
    ),
    PublishedModel(
        name="localvit_tiny_mlp4_act3_r4",
        friendly="localvit_tiny_se4",
        paper_name="LocalViT-T-SE4",
        parameters=9_376_168,
        file="localvit_t_se4.pth",
        acc1=75.738,
        acc5=93.048,
        loss=1.330,
    ),
    PublishedModel(
        name="localvit_tiny_mlp6_act1", friendly=None, paper_name="LocalViT-T, ReLU6, ratio 6", parameters=7_655_080
    ),
    PublishedModel(
        name="localvit_small_mlp4_act3_r384",
        friendly="localvit_small",
        paper_name="LocalViT-S",
        parameters=22_433_176,
        file="localvit_s.pth",
        acc1=80.780,
        acc5=95.376,
        loss=1.019,
    ),
    PublishedModel(
        name="localvit_pvt_tiny",
        friendly=None,
        paper_name="LocalViT-PVT",
        parameters=13_456_152,
        file="localvit_pvt.pth",
        acc1=78.144,
        acc5=94.238,
        loss=1.058,
    ),
    PublishedModel(
        name="localvit_tnt_t_patch16_224",
        friendly="localvit_tnt_tiny",
        paper_name="LocalViT-TNT",
        parameters=6_261_064,
        file="localvit_tnt.pth",
        acc1=75.896,
        acc5=92.898,
        loss=1.229,
    ),
    PublishedModel(
        name="localvit_tnt_s_patch16_224",
        friendly="localvit_tnt_small",
        paper_name="LocalViT-TNT-S",
        parameters=24_137_848,
    ),
    PublishedModel(
        name="localvit_swin_tiny_patch4_window7_224",
        friendly="localvit_swin_tiny",
        paper_name="LocalViT-Swin",
        parameters=29_079_010,
        file="localvit_swin.pth",
        acc1=81.86,
        acc5=95.72,
        loss=1.109,
    ),
    PublishedModel(
        name="localvit_T2t_conv7", friendly="localvit_t2t_7", paper_name="LocalViT-T2T", parameters=4_385_386
    ),
    PublishedModel(name="pvt_tiny", friendly=None, paper_name="PVT-Tiny", parameters=13_229_288),
    PublishedModel(name="tnt_t_patch16_224", friendly="tnt_tiny", paper_name="TNT-T", parameters=6_069_784),
    PublishedModel(name="T2t_vit_7", friendly="t2t_vit_7", paper_name="T2T-ViT-7", parameters=4_310_222),
)
"""FACTS of the release's README and of the released files; a test rebuilds every model and recounts it."""

OWN_MODELS = ("localvit_nano_patch4_32",)
"""Models of this package that the paper does not have."""


def list_models() -> list[str]:
    """Every name that this package registers: published, friendly, and its own."""
    names = [name for model in ZOO for name in (model.name, model.friendly) if name]
    return sorted([*names, *OWN_MODELS], key=str.lower)


def published_model(name: str) -> PublishedModel | None:
    """The published model of that name, published or friendly, if there is one."""
    return next((model for model in ZOO if name in (model.name, model.friendly)), None)


def create_model(
    name: str, pretrained: bool = False, *, localize: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Make a model by any name that timm knows, ours included, and let it remember how it was made.

    `model.made_from` holds the name and arguments, which checkpoints carry so that they can rebuild it. `localize`
    holds arguments for `localvit.localize`, {} for its defaults; the model is localized then. Other arguments go to the
    model; those that it does not know raise TypeError.

    Raises ValueError for an unknown name, with the closest known one, and as `localvit.localize`.
    """
    if not timm.is_model(name):
        known = [*list_models(), *timm.list_models()]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `localvit models` lists ours"
        raise ValueError(f"no model is called {name!r}{hint}")
    model: Any = timm.create_model(name, pretrained=pretrained, **kwargs)
    model.made_from = {"name": name, "args": {key: value for key, value in kwargs.items() if value is not None}}
    return model if localize is None else localize_with_options(model, localize, inplace=True)
