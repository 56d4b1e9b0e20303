"""Where fine-tuning begins: the weights of a checkpoint or a release, for other classes and other image sizes."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from localvit.checkpoints import (
    Checkpoint,
    describe_mismatch,
    img_size_of,
    load_weights,
    read_checkpoint,
    state_dict_mismatch,
    weights_for,
)
from localvit.data.classes import model_class_names
from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import is_checkpoint_path, load_model
from localvit.models.factory import create_model, is_model, pretrained_cfg
from localvit.models.family import Family
from localvit.models.positions import positions_like
from localvit.models.registry import find_model
from localvit.surgery.adapter import CHILD
from localvit.surgery.localize import locality_modules, localize_with_options
from localvit.utils.weight_files import CheckpointError


def load_pretrained(
    model: Any,
    source: str,
    *,
    class_names: Sequence[str] | None = None,
    remark: Callable[[str], None] = lambda message: None,
) -> Preprocessing:
    """Begin `model` with the weights that `source` names; returns how the images were prepared that they learned on.

    All but the head loads strictly; positions are resampled where the model was made for images of another size. The
    head loads too if it is for the model's classes, by name and in their order; else the model keeps its new one.
    Parameters stay the same objects, on their device and in their dtype.

    Args:
        model: made by `localvit.create_model`.
        source: a checkpoint file, whose raw weights are taken, or the name of a model that has released weights.
        class_names: names of the model's classes in order; ImageNet's for 1,000 unless given.
        remark: told what was left out or changed on the way.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged or unsafe, nothing was released under that name, or the weights are of
            another architecture. The model is then unchanged.
        ValueError: for a name that is not known, class names that do not count the model's classes, or a model that
            does not know how it was made.
        RuntimeError: when released weights cannot be downloaded.
    """
    if not hasattr(model, "made_from"):
        raise ValueError("this model does not know how it was made; make it with localvit.create_model")
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    held, held_classes, preprocessing = _load_source(source, model)
    if hasattr(model, "localized") and not locality_modules(held):
        localize_with_options(
            held, model.localized.options, inplace=True
        )  # what its weights do not have begins as it does here
        remark(f"{source}: has no locality; it is put into {len(locality_modules(held))} feed-forwards")
    heads = _head_entries(model) | _head_entries(held)
    state_dict, wanted = held.state_dict(), model.state_dict()
    _check_distillation(source, state_dict, wanted)
    moved = positions_like(held, model)
    state_dict |= moved
    reason = _why_new_head(held, held_classes, model, model_class_names(model, class_names))
    if reason:
        state_dict = {key: value for key, value in state_dict.items() if key not in heads}
        state_dict |= {key: value for key, value in wanted.items() if key in heads}
        for name in _head_entries(model):
            model.get_parameter(name).requires_grad_(True)  # trainable="locality" stops at a head that knows nothing
    wrong = state_dict_mismatch(state_dict, wanted)
    if wrong:
        raise CheckpointError(
            f"{source} does not fit the model; it is a {held.made_from['name']}: {describe_mismatch(wrong)}"
        )
    model.load_state_dict(state_dict)
    if reason:
        remark(f"{source}: head of {held.num_classes} classes left out; {reason}")
    if moved:
        remark(f"{source}: positions ({', '.join(moved)}) resampled to the model's grid")
    if differences := _differences(held.made_from, model.made_from):
        remark(f"warning: {source} was made with other arguments, which may change what its weights do: {differences}")
    return preprocessing


def check_released(name: str) -> None:
    """Raise CheckpointError if no weights of the model called `name` were released, ValueError if there is none."""
    if not is_model(name):
        create_model(name)  # raises, saying which names are close
    cfg = pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise CheckpointError(f"no weights of {name} were released: give a checkpoint file of it")


def _load_source(source: str, model: Any) -> tuple[Any, list[str] | None, Preprocessing]:
    """The model that `source` holds, at its own size and with its own head, its classes' names, and its preprocessing.

    A file that does not say how its images were prepared is taken to be of the model's released weights' kind.
    """
    if not is_checkpoint_path(source) and "/" not in source:  # no model's name has one
        check_released(source)
        ready = load_model(source)
        return ready.model, ready.class_names, ready.preprocessing
    checkpoint = read_checkpoint(source)
    if "localvit" in checkpoint.about:  # the version that wrote it, so that the file says how its model is made
        ready = load_model(source)
        return ready.model, ready.class_names, ready.preprocessing
    _check_distillation(source, checkpoint.raw, model.state_dict())
    held = _rebuild_like(checkpoint, model)
    return held, model_class_names(held, None), Preprocessing.from_pretrained_cfg(held.pretrained_cfg)


def _rebuild_like(checkpoint: Checkpoint, model: Any) -> Any:
    """A model made as `model` is, with the weights of a file that does not say how its own was made.

    Nor does it say the size of its images: it is the released models' or else the model's own, where one fills the
    positions in the file.
    """
    raw = weights_for(model, checkpoint)
    counts = [raw[key].shape[0] for key in sorted(_head_entries(model)) if key in raw and raw[key].ndim]
    arguments = model.made_from["args"] | checkpoint.args | ({"num_classes": counts[0]} if counts else {})
    if not any(f".{CHILD}." in key for key in raw):
        arguments.pop("localize", None)
    candidates: list[Any] = []
    own_size = img_size_of(model)
    for img_size in dict.fromkeys([tuple(model.pretrained_cfg["input_size"][1:]), own_size] if own_size else [None]):
        size = {"img_size": img_size} if img_size else {}
        with contextlib.suppress(ValueError):  # patches that do not divide the released models' images
            candidates.append(create_model(model.made_from["name"], **arguments | size))
    if not isinstance(model, Family):
        checkpoint = replace(checkpoint, raw=_timm_names(checkpoint.raw, candidates[0]))
    fitting = (held for held in candidates if not state_dict_mismatch(weights_for(held, checkpoint), held.state_dict()))
    held = next(fitting, candidates[0])
    load_weights(held, checkpoint, checkpoint_img_size=img_size_of(held))
    return held


def _timm_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of one of timm's models in timm's names, by the filter that timm reads research code's files with."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or state_dict.keys() == model.state_dict().keys():
        return dict(state_dict)
    try:
        converted = convert(dict(state_dict), model)
    except Exception:  # whatever a filter raises at entries that it does not expect, the check of them says it better
        return dict(state_dict)
    # Positions that it resampled it took to be of a square image, which nothing says: they stay, to be refused.
    positions = ("pos_embed", "relative_position_bias_table")
    return {
        key: state_dict[key] if key.endswith(positions) and key in state_dict else value
        for key, value in converted.items()
    }


def _head_entries(model: Any) -> set[str]:
    """Names of the entries of the model's head, or of both of a distilled one."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    parameters = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}


def _check_distillation(source: str, held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if "dist_token" in held and "dist_token" not in wanted:
        raise CheckpointError(
            f"{source} has a distillation token and the model has none: make the model with distilled=true, or choose "
            "timm's name of the distilled one"
        )
    if "dist_token" in wanted and "dist_token" not in held:
        raise CheckpointError(
            f"the model has a distillation token and {source} has none, nor a head for it: make the model without "
            "distilled=true, or begin from a distilled checkpoint"
        )


def _why_new_head(held: Any, held_names: list[str] | None, model: Any, names: list[str] | None) -> str:
    """Why the head cannot be taken over, or nothing if it can."""
    if held.num_classes != model.num_classes:
        return f"the model has {model.num_classes}"
    if held_names is None:
        return "it does not say which"
    if names is None:
        return "the model's are not named"
    other = next(((theirs, ours) for theirs, ours in zip(held_names, names, strict=True) if theirs != ours), None)
    return f"they are not the model's, which has {other[1]!r} in place of {other[0]!r}" if other else ""


def _differences(held: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """What two models were made with that differs and may change what the same weights do."""
    said: dict[str, list[str]] = {}
    for made_from in (held, model):
        published = find_model(made_from["name"])
        said.setdefault("model", []).append(published.name if published else made_from["name"])
    free = ("num_classes", "img_size", "dtype", "device", "localize")
    for key in sorted(held["args"].keys() | model["args"].keys()):
        if key not in free and not key.endswith(("_rate", "_cfg_overlay")):
            values = (made_from["args"].get(key) for made_from in (held, model))
            said[key] = [json.dumps(value, default=str) for value in values]  # as JSON, which has no tuples
    return ", ".join(f"{key} {theirs}, here {ours}" for key, (theirs, ours) in said.items() if theirs != ours)
