"""Save and load only the weights of locality: a small file for an unchanged base model."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor, nn

from localvit.surgery.localize import Localized, locality_modules, localize_with_options
from localvit.tokens.mlp import FusedMlp
from localvit.utils.distributed import is_main
from localvit.utils.files import atomic_write
from localvit.utils.plain_values import plain
from localvit.utils.weight_files import (
    CheckpointError,
    check_plain_arguments,
    check_suffix,
    read_header,
    read_weight_file,
)
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
        path: the `.safetensors` file, which is written completely or not at all.

    Returns:
        The path.

    Raises:
        ValueError: for another ending of the path, for a model that was not localized, or whose modules of the paper
            were folded by `fuse`; if locality is inside of PEFT's modules, parametrized or pruned, so that the file
            could not be loaded.
    """
    path, model = Path(path), unwrap(model)
    check_suffix(path, safetensors=True)
    localized = getattr(model, "localized", None)
    if not isinstance(localized, Localized):
        raise ValueError(f"{type(model).__name__} was not localized by localvit.localize: there is no locality to save")
    if any(isinstance(module, FusedMlp) for module in model.modules()):
        raise ValueError(
            "this model was fused, which folds the paper's modules: save the locality of the model before fuse"
        )
    state_dict = locality_state(model)
    _refuse_changed(model, state_dict, "save_locality")
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
            other options. The model is then unchanged.
        ValueError: as `localize`; if locality is inside of PEFT's modules, parametrized or pruned.
    """
    path, inner = Path(path), unwrap(model)
    tensors = without_wrappers(read_weight_file(path))
    header = read_header(path, HEADER)
    if header is None:
        raise CheckpointError(f"{path} was not written by save_locality: it has no options of localize")
    check_plain_arguments(path, header)
    is_base = not locality_modules(inner)
    try:
        # A copy without memory, so that a file that does not fit changes nothing.
        localized = localize_with_options(_on_meta_device(inner), header, inplace=True) if is_base else inner
    except TypeError as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    own = locality_state(localized)
    _refuse_changed(inner, own, "load_locality")
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
    if is_base:
        localize_with_options(inner, header, inplace=True)
    inner.load_state_dict(tensors, strict=False)
    return model


def _on_meta_device(model: Model) -> Model:
    """A deep copy whose tensors have no values."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""What the entries of locality in a state dict are called, as long as no other library has renamed them."""


def _refuse_changed(model: nn.Module, state_dict: Mapping[str, Tensor], function: str) -> None:
    """Raise ValueError if other libraries have renamed the entries of locality."""
    for name, module in model.named_modules():
        inside = not name or any(key.startswith(f"{name}.") for key in state_dict)
        if inside and type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"locality is inside of PEFT's modules ({name or type(module).__name__}): call merge_and_unload() or "
                f"unload() before {function}; PEFT's save_pretrained saves locality that is in modules_to_save"
            )
    if renamed := [key for key in state_dict if key.rpartition(".")[2] not in _ENTRIES]:
        raise ValueError(
            f"locality is parametrized or pruned ({renamed[0]}): remove that before {function} "
            "(remove_parametrizations, prune.remove)"
        )
