"""Save and load only the weights of locality: a small file for an unchanged base model."""

import json
from pathlib import Path
from typing import TypeVar

import safetensors.torch
from torch import Tensor, nn

from localvit.surgery.localize import Localized, locality_modules, localize_with_options
from localvit.tokens.mlp import FusedMlp
from localvit.utils.distributed import is_main
from localvit.utils.files import atomic_write
from localvit.utils.plain_values import plain
from localvit.utils.weight_files import CheckpointError, check_plain_arguments, read_header, read_weight_file
from localvit.utils.wrappers import is_sharded, plain_weights, unwrap, without_wrappers

HEADER = "localvit_locality"

Model = TypeVar("Model", bound=nn.Module)


def locality_state(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the model's state dict that belong to locality, buffers included; empty without locality."""
    prefixes = tuple(f"{name}." for name in locality_modules(model))
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)} if prefixes else {}


def save_locality(model: nn.Module, path: str | Path) -> Path:
    """Write the weights that `localize` added to `model`, and its options, to a safetensors file.

    The file does not contain other trained weights, such as a new head.

    Args:
        model: a model that `localize` returned.
        path: the file, which is written completely or not at all.

    Returns:
        The path.

    Raises:
        ValueError: for a model that was not localized, or whose modules of the paper were folded by `fuse`.
    """
    path, model = Path(path), unwrap(model)
    localized = getattr(model, "localized", None)
    if not isinstance(localized, Localized):
        raise ValueError(f"{type(model).__name__} was not localized by localvit.localize: there is no locality to save")
    if any(isinstance(module, FusedMlp) for module in model.modules()):
        raise ValueError(
            "this model was fused, which folds the paper's modules: save the locality of the model before fuse"
        )
    state_dict = locality_state(model)
    tensors = plain_weights(state_dict)
    if is_sharded(state_dict) and not is_main():
        return path
    with atomic_write(path) as unfinished:
        safetensors.torch.save_file(tensors, unfinished, metadata={HEADER: json.dumps(plain(localized.options))})
    return path


def load_locality(model: Model, path: str | Path) -> Model:
    """Load a file of `save_locality` into `model`, in place, as `load_state_dict` does.

    A model without locality is localized first, with the options in the file.

    Args:
        model: the base model, localized or not.
        path: the file.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: when there is no such file.
        CheckpointError: when the file is damaged, was not written by `save_locality`, or belongs to another model or
            other options.
        ValueError: as `localize`.
    """
    path, inner = Path(path), unwrap(model)
    tensors = without_wrappers(read_weight_file(path))
    header = read_header(path, HEADER)
    if header is None:
        raise CheckpointError(f"{path} was not written by save_locality: it has no options of localize")
    check_plain_arguments(path, header)
    if not locality_modules(inner):
        try:
            localize_with_options(inner, header, inplace=True)
        except TypeError as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    own = locality_state(inner)
    wrong = sorted(
        key
        for key in own.keys() | tensors.keys()
        if key not in own or key not in tensors or own[key].shape != tensors[key].shape
    )
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {type(inner).__name__}: {len(wrong)} entries are missing, unexpected or of another "
            f"shape, first {wrong[0]}; it was written for the options {header}"
        )
    inner.load_state_dict(tensors, strict=False)
    return model
