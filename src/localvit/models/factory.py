"""Making a model by its name: ours or timm's, localized or not."""

import difflib
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import nn

from localvit.models.registry import DownloadError, build, find_model, list_models
from localvit.surgery.localize import localize_with_options
from localvit.utils.plain_values import plain

NOT_ARCHITECTURE = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        *("device", "dtype", "scriptable", "exportable", "no_jit"),
    )
)
"""Arguments of `create_model` that say where weights come from or how a model runs, not which model it is."""


def is_model(name: str) -> bool:
    """Whether `create_model` can make a model of that name, with or without a tag."""
    return find_model(name) is not None or timm.is_model(name)


def pretrained_cfg(name: str) -> PretrainedCfg | None:
    """timm's pretrained configuration of a model of that name; None if timm has none for it."""
    info = find_model(name)
    return info.pretrained_cfg if info else timm.get_pretrained_cfg(name)


def create_model(
    name: str, pretrained: bool = False, *, localize: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Make a model by name: one of this package, or any of timm's.

    The name and the arguments that describe the architecture are kept in `model.made_from`, so that checkpoints can
    rebuild the model. A name that both this package and timm have means this package's model.

    Args:
        name: the name, with or without a tag for the weights.
        pretrained: load the released weights.
        localize: options of `localvit.localize` as plain values, which add locality to the model; {} for its defaults.
        kwargs: arguments of the model. Those that are None are left out.

    Raises:
        ValueError: for an unknown name, with similar known ones, and as `localvit.localize` does.
        TypeError: for an argument that the model does not have.
        RuntimeError: if released weights do not exist or cannot be downloaded.
    """
    kwargs = {
        key: value if key in NOT_ARCHITECTURE else plain(value) for key, value in kwargs.items() if value is not None
    }
    info = find_model(name)
    model: Any
    if info is not None:
        tag = name.partition(".")[2]
        checkpoint_path = kwargs.pop("checkpoint_path", None)
        model = build(info, pretrained, **{"pretrained_cfg": tag or None} | kwargs)
        if checkpoint_path:
            timm.models.load_checkpoint(model, checkpoint_path)
    elif timm.is_model(name):
        model = _create_with_timm(name, pretrained, kwargs)
    else:
        known = dict.fromkeys((*list_models(), *timm.list_models()))
        similar = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else "; `localvit models` lists ours"
        raise ValueError(f"no model is called {name!r}{hint}")
    arguments = {key: value for key, value in kwargs.items() if key not in NOT_ARCHITECTURE}
    model._model_args = getattr(model, "_model_args", {}) | arguments  # as timm.create_model does, for its save_for_hf
    model.made_from = {"name": name, "args": arguments}
    return model if localize is None else localize_with_options(model, plain(localize), inplace=True)


def _create_with_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """timm's model. Raises DownloadError, instead of the errors of several libraries, without a network."""
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, HTTPException) as error:
        cfg = timm.get_pretrained_cfg(name)
        if not pretrained or cfg is None or kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
            raise
        url = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)
        raise DownloadError(name, url, error) from error
