"""The weights that locality brought, alone: a small file on top of an unchanged base model."""

import json
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from localvit.surgery.localize import Localized, locality_modules, localize
from localvit.utils.files import atomic_write
from localvit.utils.weight_files import CheckpointError, check_plain_arguments, read_header, read_weight_file

HEADER = "localvit_locality"

Model = TypeVar("Model", bound=nn.Module)


def locality_state(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the model's state dict that locality brought, buffers included; none without locality."""
    prefixes = tuple(f"{name}." for name in locality_modules(model))
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)} if prefixes else {}


def save_locality(model: nn.Module, path: str | Path) -> Path:
    """Write what `localize` added to `model`, and how, to a safetensors file, whole or not at all; returns the path.

    Nothing else that was trained is in it, no head and no other weights of the base.

    Raises ValueError for a model that was not localized.
    """
    path = Path(path)
    localized = getattr(model, "localized", None)
    if not isinstance(localized, Localized):
        raise ValueError(f"{type(model).__name__} was not localized by localvit.localize: nothing to save alone")
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in locality_state(model).items()
    }
    with atomic_write(path) as unfinished:
        safetensors.torch.save_file(tensors, unfinished, metadata={HEADER: json.dumps(localized.options)})
    return path


def load_locality(model: Model, path: str | Path) -> Model:
    """Localize `model` as the file of `save_locality` says, and load its weights, in place; returns the model.

    A model that is localized already keeps its form and takes the weights alone.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, is not of `save_locality`, or is of another model or another form.
        ValueError: as `localize`.
    """
    path = Path(path)
    tensors = read_weight_file(path)
    header = read_header(path, HEADER)
    if header is None:
        raise CheckpointError(f"{path} was not written by save_locality: it does not say how a model is localized")
    check_plain_arguments(path, header)
    if not locality_modules(model):
        try:
            localize(model, **header)
        except TypeError as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    wanted = locality_state(model)
    wrong = sorted(
        key
        for key in wanted.keys() | tensors.keys()
        if key not in wanted or key not in tensors or wanted[key].shape != tensors[key].shape
    )
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {len(wrong)} entries are missing, surplus or of another "
            f"shape, first {wrong[0]}; it was made by localize with {header}"
        )
    model.load_state_dict(tensors, strict=False)
    return model
