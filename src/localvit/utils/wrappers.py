"""The model inside wrappers, and its weights as plain tensors under the model's own names."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)
_COMPILED = "_orig_mod"
"""Where torch.compile keeps the module that it compiled."""


def unwrap(model: nn.Module) -> Any:
    """The model in torch.compile, DataParallel, DistributedDataParallel or a moving average, or `model` itself."""
    while True:
        if _COMPILED in model._modules:
            model = model.get_submodule(_COMPILED)
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            return model


def without_wrappers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a wrapped model, or of one with compiled blocks, under the names of the model itself."""
    cleaned = {key.replace(f"{_COMPILED}.", ""): value for key, value in state_dict.items()}
    while any(key.startswith("module.") for key in cleaned):
        others = {key for key in cleaned if not key.startswith("module.")} - {"n_averaged"}  # that of AveragedModel
        if others:
            break
        cleaned = {key.removeprefix("module."): value for key, value in cleaned.items() if key.startswith("module.")}
    return cleaned


def is_sharded(state_dict: Mapping[str, Any]) -> bool:
    """Whether its tensors are spread over several processes, as `fully_shard` does."""
    return any(hasattr(value, "full_tensor") for value in state_dict.values())


def is_quantized(state_dict: Mapping[str, Any]) -> bool:
    """Whether entries are not tensors, or tensors that another library represents in its own way, as torchao does."""
    return any(_is_quantized(value) for value in state_dict.values())


def _is_quantized(value: Any) -> bool:
    return not isinstance(value, Tensor) or (is_traceable_wrapper_subclass(value) and not hasattr(value, "full_tensor"))


def plain_weights(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, under the names of the model without wrappers.

    Sharded tensors are gathered, which every process must take part in.

    Raises ValueError if the entries are not plain tensors with values, as those of a quantized model or of one on the
    meta device.
    """
    named = without_wrappers(state_dict)
    for key, value in named.items():
        if _is_quantized(value):
            raise ValueError(
                f"{key} is a {type(value).__name__} and not a plain tensor, as in a quantized model: save the model as "
                "it was before that"
            )
        if value.is_meta:
            raise ValueError(f"{key} is on the meta device, where it has no values: load or initialize the model first")
    copies = {}
    for key, value in named.items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        # A copy, because safetensors refuses tensors that share memory.
        copies[key] = whole.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copies
