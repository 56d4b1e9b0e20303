"""Initial weights for fine-tuning: from a checkpoint or a release, for other classes and other image sizes."""

import contextlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
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
from localvit.models.registry import DownloadError, find_model
from localvit.surgery.localize import locality_modules, localize_with_options
from localvit.surgery.projection import CHILD
from localvit.utils.weight_files import CheckpointError

logger = logging.getLogger(__name__)


def load_pretrained(model: Any, source: str, *, class_names: Sequence[str] | None = None) -> Preprocessing:
    """Initialize `model` with pretrained weights, for fine-tuning. Logs what was left out or changed.

    All weights except the head load strictly. Position embeddings are resampled if the model was created for another
    image size. The head loads as well if it is for the same classes, by name and in the same order; otherwise the model
    keeps its new head. Parameters remain the same objects, with their device and dtype.

    Args:
        model: created by `localvit.create_model`.
        source: a checkpoint file, of which the raw weights are used, or the name of a model with released weights.
        class_names: names of the model's classes in order; by default ImageNet's for 1,000 classes.

    Returns:
        The preprocessing with which the weights were trained.

    Raises:
        FileNotFoundError: if the file does not exist.
        CheckpointError: if the file is damaged or unsafe, no weights were released under the name, or the weights are
            for another architecture. The model is then unchanged.
        ValueError: for an unknown name, a wrong number of class names, or a model without a record of its arguments.
        RuntimeError: if released weights cannot be downloaded.
    """
    if not hasattr(model, "made_from"):
        raise ValueError("the model has no record of its arguments; create it with localvit.create_model")
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for a model with {model.num_classes} classes")
    pretrained, pretrained_classes, preprocessing = _load_source(source, model)
    if hasattr(model, "localized") and not locality_modules(pretrained):
        # Its locality is initialized as that of the model.
        localize_with_options(pretrained, model.localized.options, inplace=True)
        logger.info(
            f"{source}: has no locality modules; added to {len(locality_modules(pretrained))} feed-forward layers"
        )
    heads = _head_entries(model) | _head_entries(pretrained)
    state_dict, expected = pretrained.state_dict(), model.state_dict()
    _check_distillation(source, state_dict, expected)
    resampled = positions_like(pretrained, model)
    state_dict |= resampled
    reason = _why_new_head(pretrained, pretrained_classes, model, model_class_names(model, class_names))
    if reason:
        state_dict = {key: value for key, value in state_dict.items() if key not in heads}
        state_dict |= {key: value for key, value in expected.items() if key in heads}
        for name in _head_entries(model):
            model.get_parameter(name).requires_grad_(True)  # a new head is trained even with trainable="locality"
    mismatch = state_dict_mismatch(state_dict, expected)
    if mismatch:
        raise CheckpointError(
            f"{source} does not fit the model; it contains a {pretrained.made_from['name']}: "
            f"{describe_mismatch(mismatch)}"
        )
    model.load_state_dict(state_dict)
    if reason:
        logger.info(f"{source}: its head for {pretrained.num_classes} classes is not used: {reason}")
    if resampled:
        logger.info(f"{source}: position embeddings ({', '.join(resampled)}) resampled to the model's grid")
    if differences := _differences(pretrained.made_from, model.made_from):
        logger.warning(
            f"{source} was created with different arguments, with which the same weights may compute something else: "
            f"{differences}"
        )
    return preprocessing


def check_released(name: str) -> None:
    """Raise CheckpointError if no weights of the model `name` were released, and ValueError for an unknown name."""
    if not is_model(name):
        create_model(name)  # raises, with similar names in the message
    cfg = pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise CheckpointError(f"no weights of {name} were released: give a checkpoint file instead")


def _load_source(source: str, model: Any) -> tuple[Any, list[str] | None, Preprocessing]:
    """The model in `source`, with its own image size and head, its class names, and its preprocessing.

    A file without a preprocessing gets that of the model's released weights.
    """
    if not is_checkpoint_path(source) and "/" not in source:  # names of models contain no slash
        check_released(source)
        try:
            ready = load_model(source)
        except DownloadError as error:
            packaged = "--model localvit_nano_patch4_32 --finetune localvit_nano_patch4_32"
            advice = f"give the file with --finetune FILE, or start from the weights in this package: {packaged}"
            raise error.with_advice(advice) from error
        return ready.model, ready.class_names, ready.preprocessing
    checkpoint = read_checkpoint(source)
    if "localvit" in checkpoint.about:  # written by localvit, so it contains the arguments of its model
        loaded = load_model(source)
        return loaded.model, loaded.class_names, loaded.preprocessing
    _check_distillation(source, checkpoint.raw, model.state_dict())
    pretrained = _rebuild_like(checkpoint, model)
    preprocessing = Preprocessing.from_pretrained_cfg(pretrained.pretrained_cfg)
    return pretrained, model_class_names(pretrained, None), preprocessing


def _rebuild_like(checkpoint: Checkpoint, model: Any) -> Any:
    """A model like `model` with the weights of a file that contains neither a model's arguments nor an image size.

    The image size is that of the released models or of `model`, whichever fits the position embeddings in the file.
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
        with contextlib.suppress(ValueError):  # the patch size does not divide the released models' image size
            candidates.append(create_model(model.made_from["name"], **arguments | size))
    if not isinstance(model, Family):
        checkpoint = replace(checkpoint, raw=_timm_names(checkpoint.raw, candidates[0]))
    fitting = (each for each in candidates if not state_dict_mismatch(weights_for(each, checkpoint), each.state_dict()))
    pretrained = next(fitting, None)
    if pretrained is None:
        load_weights(candidates[0], checkpoint)  # raises, and the message describes the mismatch
        return candidates[0]
    load_weights(pretrained, checkpoint, checkpoint_img_size=img_size_of(pretrained))
    return pretrained


def _timm_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a timm model under timm's names, converted by timm's own filter for files from research code."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or state_dict.keys() == model.state_dict().keys():
        return dict(state_dict)
    try:
        converted = convert(dict(state_dict), model)
    except Exception:  # the later check of the entries gives a better message than a filter
        return dict(state_dict)
    # timm resamples position embeddings as if for a square image, which may be wrong. Keep them, so that they fail.
    positions = ("pos_embed", "relative_position_bias_table")
    return {
        key: state_dict[key] if key.endswith(positions) and key in state_dict else value
        for key, value in converted.items()
    }


def _head_entries(model: Any) -> set[str]:
    """Names of the parameters of the model's head, or of both heads of a distilled model."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    parameters = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}


def _check_distillation(source: str, pretrained: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    if "dist_token" in pretrained and "dist_token" not in model:
        raise CheckpointError(
            f"{source} has a distillation token and the model has none: create the model with distilled=true, or "
            "choose timm's distilled model"
        )
    if "dist_token" in model and "dist_token" not in pretrained:
        raise CheckpointError(
            f"the model has a distillation token, and {source} has neither the token nor its head: create the model "
            "without distilled=true, or start from a distilled checkpoint"
        )


def _why_new_head(pretrained: Any, pretrained_names: list[str] | None, model: Any, names: list[str] | None) -> str:
    """Why the pretrained head cannot be used; empty if it can."""
    if pretrained.num_classes != model.num_classes:
        return f"the model has {model.num_classes} classes"
    if pretrained_names is None:
        return "its class names are not known"
    if names is None:
        return "the model's class names are not known"
    pairs = zip(pretrained_names, names, strict=True)
    different = next(((theirs, ours) for theirs, ours in pairs if theirs != ours), None)
    return f"the model has class {different[1]!r} where it has {different[0]!r}" if different else ""


def _differences(pretrained: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Arguments of two models that differ and may change what the same weights compute."""
    values_of: dict[str, list[str]] = {}
    for made_from in (pretrained, model):
        published = find_model(made_from["name"])
        values_of.setdefault("model", []).append(published.name if published else made_from["name"])
    irrelevant = ("num_classes", "img_size", "dtype", "device", "localize")
    for key in sorted(pretrained["args"].keys() | model["args"].keys()):
        if key not in irrelevant and not key.endswith(("_rate", "_cfg_overlay")):
            values = (made_from["args"].get(key) for made_from in (pretrained, model))
            values_of[key] = [json.dumps(value, default=str) for value in values]  # as JSON, which has no tuples
    return ", ".join(f"{key} {theirs}, here {ours}" for key, (theirs, ours) in values_of.items() if theirs != ours)
