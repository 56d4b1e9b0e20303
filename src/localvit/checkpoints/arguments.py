"""Which arguments a file may hand to a model: those of its architecture, in plain values, and nothing that loads.

A checkpoint carries the arguments that its model was made with. A crafted file must not be able to use them to download
something, to open another file, to run code, or to allocate more memory than its own weights take.
"""

import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from localvit.checkpoints.contents import Checkpoint
from localvit.checkpoints.mismatch import describe_mismatch, state_dict_mismatch
from localvit.models.factory import NOT_ARCHITECTURE, create_model
from localvit.models.family import Family
from localvit.models.registry import find_model
from localvit.utils.weight_files import CheckpointError, check_plain_arguments

_TIMM_ARGUMENTS = frozenset(("bn_eps", "bn_momentum", "bn_tf"))
"""Architecture arguments that timm's entry points take and its classes do not."""

_DEPTH = re.compile(r"(depths?|layers|num_blocks)$")
"""Names of arguments that say how many layers a model has."""


def architecture_arguments(name: str) -> frozenset[str]:
    """Names of the arguments that describe the architecture of the named model, and `localize`."""
    info = find_model(name)
    cls = info.family if info else _class_of(name.partition(".")[0])
    functions = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    functions += [cls.create] if issubclass(cls, Family) else []
    named = {
        parameter.name
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return frozenset(named | _TIMM_ARGUMENTS | {"localize"}) - NOT_ARCHITECTURE - {"self"}


@functools.cache
def _class_of(name: str) -> type[nn.Module]:
    try:
        with torch.device("meta"):
            return type(timm.create_model(name))
    except NotImplementedError:  # its constructor reads the values of a tensor
        return type(timm.create_model(name))


def refused_arguments(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that a file may not have for the named model."""
    allowed = architecture_arguments(name)
    refused = []
    for key, value in arguments.items():
        try:
            check_plain_arguments("", {key: value})
        except CheckpointError:
            refused.append(key)
        else:
            refused += [key] if key not in allowed else []
    return refused


def check_arguments(checkpoint: Checkpoint, name: str) -> None:
    """Raise CheckpointError if an argument in the file is not a plain value or not one of the architecture's."""
    path, arguments = checkpoint.path, checkpoint.args
    check_plain_arguments(path, arguments)
    refused = sorted(arguments.keys() - architecture_arguments(name))
    if refused:
        raise CheckpointError(
            f"{path} asks for {', '.join(refused)}, which was refused: a checkpoint may only have arguments of the "
            f"architecture {name}; get it from a source that you trust, or save it again without them"
        )
    for key, value in arguments.items():
        if _DEPTH.search(key) and sum(_numbers(value)) > len(checkpoint.raw):
            raise CheckpointError(
                f"{path} is damaged: it asks for {key}={value!r} and has only {len(checkpoint.raw)} tensors"
            )


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


def model_without_memory(checkpoint: Checkpoint, name: str) -> nn.Module | None:
    """The model that the file describes, on the meta device; None for one that cannot be made there.

    Raises CheckpointError if it cannot be made with the arguments in the file.
    """
    try:
        return _on_meta_device(name, checkpoint.args)
    except Exception as error:  # whatever a constructor raises for values that it does not expect
        raise CheckpointError(
            f"{checkpoint.path} is damaged: {name} cannot be made with the arguments in it ({error})"
        ) from error


def _on_meta_device(name: str, arguments: Mapping[str, Any]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return create_model(name, **arguments)
    except NotImplementedError:  # its constructor reads the values of a tensor
        return None


def check_rebuilt(path: Path, header: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, kind: str) -> None:
    """Raise ValueError if the model that a header describes has other entries than `state_dict`."""
    described = described_model(header["name"], json.dumps(header["args"], sort_keys=True))
    if described is not None and (wrong := state_dict_mismatch(state_dict, described.state_dict())):
        raise ValueError(
            f"{path} was not written, because it could not be loaded: the layers of this {kind} are not those that "
            f"{header['name']} is made with ({describe_mismatch(wrong)}); save the model as it was before fuse, "
            "quantization, pruning or other changes of its layers"
        )


@functools.lru_cache(maxsize=8)  # training saves the same model every epoch
def described_model(name: str, arguments: str) -> nn.Module | None:
    """The model with these arguments, as JSON, on the meta device; None for one that cannot be made there.

    It is for looking at only: every call with the same arguments returns the same one.
    """
    return _on_meta_device(name, json.loads(arguments))
