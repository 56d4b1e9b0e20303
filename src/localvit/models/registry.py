"""What every family's entry points share: timm's builder, the released files, and the friendly names."""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import URLError

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from localvit.models.positions import resample_state
from localvit.utils.weight_files import read_weight_file

RELEASE = "https://github.com/ofsoundof/LocalViT/releases/download/v1.0.0/"

COMPUTED_ENTRIES = ("relative_position_index", "attn_mask")
"""Endings of published entries that the model computes from its sizes; nothing is read from them."""


def released_cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained configuration of a model, with the released `file` where there is one.

    The preprocessing is what the published numbers were made with, for every model: short side to
    int(256 / 224 * size), bicubic, center crop, ImageNet mean and deviation.
    """
    return {
        "url": RELEASE + file if file else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2104.05707",
        "paper_name": "LocalViT: Bringing Locality to Vision Transformers",
        "origin_url": "https://github.com/ofsoundof/LocalViT",
        **kwargs,
    }


def published_key(model: nn.Module, key: str) -> str:
    """The published program's name for entry `key` of the model's state dict, by its class's `PUBLISHED_KEYS` table."""
    for pattern, replacement in getattr(model, "PUBLISHED_KEYS", ()):
        key, replaced = re.subn(pattern, replacement, key)
        if replaced:
            break
    return key


def own_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of published names in ours; unknown entries keep their names, computed ones are left out."""
    ours = {published_key(model, key): key for key in model.state_dict()}
    return {ours.get(key, key): value for key, value in state_dict.items() if not key.endswith(COMPUTED_ENTRIES)}


def from_published(
    state_dict: dict[str, Any], model: Any, img_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Raw weights in our names, out of a published checkpoint or state dict; unknown entries keep their names.

    Positions, learned on `img_size` (by default that of the released files), are resampled where the model was made
    for another grid.
    """
    renamed = own_names(state_dict.get("model", state_dict), model)
    return resample_state(model, renamed, img_size or model.pretrained_cfg["input_size"][1:])


def build(model_cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg` with our way of reading released files: raw weights, strictly, no code run.

    Raises RuntimeError when `pretrained` weights cannot be fetched, naming the file and how to pass a copy.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if pretrained and overlay.get("file"):
        overlay["state_dict"] = read_weight_file(overlay.pop("file"))
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return build_model_with_cfg(
                model_cls,
                variant,
                pretrained,
                pretrained_cfg_overlay=overlay,
                pretrained_filter_fn=from_published,
                feature_cfg=feature_cfg,
                **kwargs,
            )
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        url = overlay.get("url") or sys.modules[model_cls.__module__].default_cfgs[variant].default.url
        raise RuntimeError(
            f"could not download the weights of {variant} ({error}): fetch {url} by other means and pass "
            f'pretrained_cfg_overlay={{"file": "{url.rsplit("/", 1)[-1]}"}} beside pretrained=True'
        ) from error


def also_known_as(*aliases: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register a model's entry point under its own, published name and under friendly ones."""

    def register(entry: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        register_model(entry)
        module = sys.modules[entry.__module__]
        for alias in aliases:

            @functools.wraps(entry)
            def friendly(*args: Any, **kwargs: Any) -> nn.Module:
                return entry(*args, **kwargs)

            friendly.__name__ = friendly.__qualname__ = alias
            setattr(module, alias, friendly)
            module.default_cfgs[alias] = module.default_cfgs[entry.__name__]
            register_model(friendly)
        return entry

    return register
