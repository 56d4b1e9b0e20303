"""A localized model under a name that timm knows, so that timm and transformers can make it from a folder.

`timm.create_model` has no argument for `localvit.localize`. The name `localvit_localized` has: the model that it is
made from, and the options. Whatever makes a model by its name and its arguments then makes localized models too.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import load_pretrained, register_model
from torch import nn

from localvit.models.factory import NOT_ARCHITECTURE, create_model

LOCALIZED = "localvit_localized"
"""The name of the entry point."""


@register_model
def localvit_localized(
    pretrained: bool = False,
    *,
    base: str = "deit_tiny_patch16_224",
    localize: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    features_only: bool = False,
    pretrained_model_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model `base` of this package or of timm after `localvit.localize`.

    Args:
        pretrained: load the weights that `pretrained_cfg` names, which are those of the localized model.
        base: name of the model.
        localize: options of `localvit.localize` as plain values; None for its defaults.
        pretrained_cfg, pretrained_cfg_overlay, cache_dir: as in `timm.create_model`.
        features_only: is refused.
        pretrained_model_args: what timm adds for the models of a folder.
        kwargs: arguments of the model.

    Raises:
        ValueError: as `localvit.create_model`, for `features_only`, and for arguments that say where weights come from.
        RuntimeError: if `pretrained_cfg` names no weights.
    """
    if features_only:
        raise ValueError(
            f"{LOCALIZED} has no features_only: make the model without it, and call its forward_intermediates"
        )
    if refused := sorted(kwargs.keys() & NOT_ARCHITECTURE - {"device", "dtype"}):
        raise ValueError(f"{LOCALIZED} has no argument {', '.join(refused)}")
    cfg = dict(pretrained_cfg) if isinstance(pretrained_cfg, Mapping) else None
    if cfg is not None:
        cfg |= dict(pretrained_cfg_overlay or {})
        kwargs.setdefault("num_classes", cfg.get("num_classes"))
    model: Any = create_model(base, localize=localize or {}, **kwargs)
    if cfg is not None:
        model.pretrained_cfg = dict(model.pretrained_cfg) | cfg
    if pretrained:
        channels = kwargs.get("in_chans", 3)
        load_pretrained(
            model, cfg or {}, num_classes=model.num_classes, in_chans=channels, strict=True, cache_dir=cache_dir
        )
    return model
