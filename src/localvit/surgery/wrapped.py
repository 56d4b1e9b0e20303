"""Wrapped models, whose modules cannot be changed any more without the wrapper's knowledge."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from localvit.utils.wrappers import is_sharded


def refuse_wrapped(model: nn.Module, function: str) -> None:
    """Raise ValueError for a model that is wrapped, compiled, sharded or scripted, or contains such a module.

    Args:
        model: the model.
        function: the name of the function that would change it, for the message.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"this model is TorchScript, which cannot be changed: {function} the module it came from")
    for name, module in model.named_modules():
        this = f"{name} of this model" if name else "this model"
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"{this} is compiled: {function} it first, then compile it")
        if hasattr(module, "get_base_model") and hasattr(module, "peft_config"):
            raise ValueError(f"{this} is wrapped by PEFT: {function} it first, then call get_peft_model")
        if isinstance(module, DistributedDataParallel | DataParallel):
            inner = f"{name}.module" if name else "model.module"
            raise ValueError(f"{this} is wrapped in {type(module).__name__}: {function} {inner} before you wrap it")
    for name, parameter in model.named_parameters():
        if is_sharded({name: parameter}) or hasattr(parameter, "_is_flat_param"):
            raise ValueError(
                f"the parameters of this model are sharded over processes ({name}), and each process would change its "
                f"own part only: {function} the model before fully_shard, FSDP or parallelize_module"
            )
