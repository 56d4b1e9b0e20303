"""The models of this package by name, and everything that is known about each of them, stated once.

A family's file registers a `ModelInfo` for each of its models. Everything else derives from these records: timm's entry
points and pretrained configurations, aliases, lists, and the published numbers in the documentation.

Names and timm: timm keeps one entry point per name, and some of our names are general (`pvt_tiny`). A name that timm
has when localvit is imported stays timm's, and a later registration of the same name replaces ours in timm.
`localvit.create_model`, `localvit.list_models` and checkpoints use this registry first, so that in this package a name
always means the same model.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import nn

from localvit.models.family import Family
from localvit.models.packaged import PackagedWeights
from localvit.models.pretrained import from_published, read_file

RELEASE = "https://github.com/ofsoundof/LocalViT/releases/download/v1.0.0/"

TIMM_MODULE = "localvit.models"
"""The module whose attributes the entry points are. timm groups models by its last component, so that
`timm.list_models(module="models")` lists exactly ours; the names of the files (`tnt`) are names of timm's files too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInfo:
    """One model: how it is made, and what was published about it.

    Accuracies and loss are those of the raw weights on the 50,000 images of the ImageNet-1k validation set.
    """

    name: str
    """The published name, or the name in this package for a model that was not published."""
    family: type[Family]
    """The class of the model."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of that class that make this model."""
    alias: str | None = None
    """A short name for the same model."""
    paper_name: str | None = None
    """What the paper calls it; None for a model of this package only."""
    parameters: int
    """Number of parameters."""
    multiply_adds: int | None = None
    """Number of multiply-adds for one image of `input_size`, counted by `localvit.inference.cost`; None if unknown."""
    file: str | None = None
    """The released file with the weights, if there is one. No checksum was published."""
    packaged: PackagedWeights | None = None
    """Weights that this package contains, for a model without a released file."""
    acc1: float | None = None
    """Published top-1 accuracy in percent."""
    acc5: float | None = None
    """Published top-5 accuracy in percent."""
    loss: float | None = None
    """Published loss in nats (a mean of batch means)."""
    input_size: tuple[int, int, int] = (3, 224, 224)
    """Channels, height and width of the images."""
    num_classes: int = 1000
    """Classes of the head."""
    crop_pct: float = 224 / 256
    """Side of the center crop over the resized short side."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model."""
        return (self.name, self.alias) if self.alias else (self.name,)

    @property
    def url(self) -> str | None:
        """Address of the released file."""
        return RELEASE + self.file if self.file else None

    @property
    def tag(self) -> str:
        """timm's tag of the weights: what comes after the dot in a name like `localvit_tiny.in1k`."""
        if self.packaged:
            return self.packaged.tag
        return "in1k" if self.file else "untrained"

    @property
    def pretrained_cfg(self) -> PretrainedCfg:
        """timm's pretrained configuration: the file of weights and the preprocessing of the published evaluation.

        That is, for every model: short side resized to int(256 / 224 * size), bicubic, center crop, ImageNet mean and
        standard deviation.
        """
        fields = {"first_conv": "patch_embed.proj", "classifier": "head"} | dict(self.family.timm_cfg)
        return PretrainedCfg(
            url=self.url or "",
            file=self.packaged.path if self.packaged else None,
            label_names=self.packaged.class_names if self.packaged else None,  # type: ignore[arg-type]  # timm: of one
            architecture=self.name,
            tag=self.tag,
            num_classes=self.num_classes,
            input_size=self.input_size,
            crop_pct=self.crop_pct,
            interpolation="bicubic",
            fixed_input_size=False,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            paper_ids="arXiv:2104.05707",
            paper_name="LocalViT: Bringing Locality to Vision Transformers",
            origin_url="https://github.com/ofsoundof/LocalViT",
            **fields,
        )


class DownloadError(RuntimeError):
    """Released weights cannot be downloaded. The message names the file and says how to use a copy of it."""

    def __init__(self, name: str, url: str, cause: Exception, advice: str = "") -> None:
        self.name, self.url, self.cause = name, url, cause
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        file = url.rsplit("/", 1)[-1]
        advice = advice or f'pass pretrained_cfg_overlay={{"file": "{file}"}} with pretrained=True'
        super().__init__(
            f"could not download the weights of {name} ({reason}): download {url} in another way and {advice}"
        )

    def with_advice(self, advice: str) -> "DownloadError":
        """The same error with what to do with the file, such as "give it with --checkpoint FILE"."""
        return DownloadError(self.name, self.url, self.cause, advice)


_MODELS: dict[str, ModelInfo] = {}


def register_model(info: ModelInfo) -> None:
    """Register a model under its name and its alias, here and with timm.

    A name that timm has already is not registered there (see the top of this file). The entry points are attributes of
    `localvit.models` too.

    Raises ValueError for a name that this registry has already.
    """
    taken = [name for name in info.names if name in _MODELS]
    if taken:
        raise ValueError(f"the name {taken[0]!r} is registered for {_MODELS[taken[0]].family.__name__}: choose another")
    module: Any = sys.modules[TIMM_MODULE]
    default_cfgs = vars(module).setdefault("default_cfgs", {})
    for name in info.names:
        _MODELS[name] = info
        default_cfgs |= generate_default_cfgs({f"{name}.{info.tag}": info.pretrained_cfg})
        entry_point = _entry_point(name, info)
        setattr(module, name, entry_point)
        if not timm.is_model(name):
            register_with_timm(entry_point)


def _entry_point(name: str, info: ModelInfo) -> Any:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(info, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = TIMM_MODULE
    entry_point.__doc__ = f"{info.paper_name or info.name} ({info.family.__name__}); see `localvit.create_model`."
    return entry_point


def build(
    info: ModelInfo,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make a model with timm's `build_model_with_cfg`. Released files are read strictly and without running code.

    Args:
        info: the model.
        pretrained: load the raw weights of the released or packaged file.
        pretrained_cfg, pretrained_cfg_overlay: as in `timm.create_model`. A `file` replaces the download, and a `file`
            or `url` the packaged file.
        kwargs: arguments of the model, in place of those in `info`, and of `build_model_with_cfg`.

    Raises:
        RuntimeError: if the model has no released weights, or they cannot be downloaded. The message then names the
            file and says how to use a copy of it.
        ValueError: for a tag of weights that the model does not have.
    """
    if isinstance(pretrained_cfg, str) and pretrained_cfg not in ("", info.tag):
        raise ValueError(f"{info.name} has no weights with the tag {pretrained_cfg!r}, only {info.tag!r}")
    cfg = info.pretrained_cfg if pretrained_cfg is None or isinstance(pretrained_cfg, str) else pretrained_cfg
    overlay = dict(pretrained_cfg_overlay or {})
    if not pretrained or overlay.keys() & {"url", "file", "state_dict"}:
        overlay = {"label_names": None} | overlay  # not the classes of the packaged weights
    if overlay.get("url"):
        overlay = {"file": None} | overlay  # timm prefers a file
    img_size = None
    if pretrained and overlay.get("file"):
        overlay["state_dict"], img_size = read_file(overlay.pop("file"))
    feature_cfg = {"out_indices": kwargs.pop("out_indices", info.family.out_indices), "feature_cls": "getter"}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return build_model_with_cfg(
                info.family.create,
                info.name,
                pretrained,
                pretrained_cfg=cfg,  # type: ignore[arg-type]  # timm accepts both
                pretrained_cfg_overlay=overlay,
                pretrained_filter_fn=partial(from_published, img_size=img_size),
                feature_cfg=feature_cfg,
                **dict(info.args) | kwargs,
            )
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise DownloadError(info.name, str(overlay.get("url") or info.url), error) from error


def find_model(name: str) -> ModelInfo | None:
    """The model of this package that has that name or alias, with or without a tag; None if there is none."""
    return _MODELS.get(name.partition(".")[0])


def packaged_weights(name: str) -> PackagedWeights | None:
    """The weights in this package that `pretrained=True` means for a name, with or without a tag; None if none."""
    info, tag = find_model(name), name.partition(".")[2]
    return info.packaged if info and tag in ("", info.tag) else None


def registered_models() -> list[ModelInfo]:
    """Every model of this package once, the published ones first."""
    return sorted(dict.fromkeys(_MODELS.values()), key=lambda info: info.paper_name is None)


def list_models() -> list[str]:
    """Every name of a model of this package, aliases included, in alphabetical order."""
    return sorted(_MODELS, key=str.lower)
