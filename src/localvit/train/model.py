"""The model in training: creation, initial weights, frozen parameters, moving average, and data parallelism."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from localvit.data.preprocessing import Preprocessing
from localvit.data.training_batches import RandomPurpose, seed_random
from localvit.models.factory import create_model
from localvit.models.published_names import published_key
from localvit.train.buffers import SavedBuffers, copy_all
from localvit.train.config import TrainConfig
from localvit.train.cuda_graph import GraphedModel
from localvit.train.finetune import load_pretrained
from localvit.train.optimization import freeze
from localvit.train.resume import Start
from localvit.utils.distributed import world_size


def build_model(
    config: TrainConfig, num_classes: int, class_names: Sequence[str] | None, start: Start | None = None
) -> tuple[Any, Preprocessing]:
    """The model to train, on the CPU, and the preprocessing of its images.

    The weights of a resumed run are not loaded here, but nothing else is needed for them than its checkpoint.

    Raises:
        ValueError: for an unknown model or argument, or a pattern of `freeze` that matches nothing.
        FileNotFoundError, CheckpointError: if the weights to start from cannot be used.
    """
    size = (config.input_size[0], config.input_size[-1]) if config.input_size else None
    model = _create(config, num_classes, size)
    preprocessing = Preprocessing.published(size or model.pretrained_cfg["input_size"][1:])
    if start and start.entries is not None:
        preprocessing = _as_resumed(model, preprocessing, start)
    elif config.finetune:
        pretrained = load_pretrained(model, config.finetune, class_names=class_names)
        preprocessing = replace(preprocessing, mean=pretrained.mean, std=pretrained.std)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    freeze(model, config.freeze)
    return model, preprocessing


def _as_resumed(model: nn.Module, preprocessing: Preprocessing, start: Start) -> Preprocessing:
    """Train what the run trained, which may include a new head; returns the preprocessing with its normalization."""
    if "parameter_names" in start.header:
        trained = set(start.header["parameter_names"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(published_key(model, name) in trained)
    recorded = start.header.get("preprocessing")
    if recorded is None:
        return preprocessing
    return replace(preprocessing, mean=tuple(recorded["mean"]), std=tuple(recorded["std"]))


def _create(config: TrainConfig, num_classes: int, size: tuple[int, int] | None) -> Any:
    seed_random(config.seed, RandomPurpose.WEIGHTS)
    arguments: dict[str, Any] = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    arguments |= config.model_args | {"num_classes": num_classes, "localize": config.localize}
    try:
        return create_model(config.model, **arguments | ({"img_size": size} if size else {}))
    except TypeError as error:
        if size is None or "img_size" not in str(error):
            raise
    seed_random(config.seed, RandomPurpose.WEIGHTS)
    return create_model(config.model, **arguments)  # convolutional networks take no image size


def build_average(config: TrainConfig, model: nn.Module) -> ModelEmaV3 | None:
    """The moving average of parameters and buffers; None if it is off."""
    if config.ema_decay is None:
        return None
    return _Average(model, decay=config.ema_decay, device=torch.device("cpu") if config.ema_on_cpu else None)


class _Average(ModelEmaV3):
    """timm's average, with one call for the integers too: timm copies the step counters of batch norms one by one."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if not self.foreach:  # on another device than the model
            super().apply_update_(model, decay)
            return
        # Without keep_vars, a state dict detaches each of its tensors.
        averaged, current = (each.state_dict(keep_vars=True).values() for each in (self.module, model))
        pairs = list(zip(averaged, current, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_([pair[0] for pair in floats], [pair[1] for pair in floats], weight=1 - decay)
        copy_all([pair[0] for pair in others], [pair[1] for pair in others])


def wrap_model(
    config: TrainConfig, model: nn.Module, device: torch.device, dtype: torch.dtype, size: tuple[int, int]
) -> Any:
    """The model in DistributedDataParallel if there are several processes, and compiled or captured if configured.

    `dtype` is that of autocast, and `size` the height and width of the images in pixels.

    Raises ValueError if the model is to be captured in CUDA graphs, and cannot be.
    """
    if config.cuda_graph:
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        sample_BCHW = torch.zeros(config.batch_size, 3, *size, device=device).contiguous(memory_format=layout)
        return GraphedModel(model, sample_BCHW, dtype)
    wrapped = model
    if world_size() > 1:
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=_has_unused_parameters(model, size, device),
        )
    return torch.compile(wrapped) if config.compile else wrapped


def _has_unused_parameters(model: nn.Module, size: tuple[int, int], device: torch.device) -> bool:
    """Whether some parameter gets no gradient (the tokenizer of LocalViT-T2T has a published norm without a use)."""
    buffers_before = SavedBuffers(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs = model.train()(torch.zeros(2, 3, *size, device=device))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad([output.sum() for output in outputs], parameters, allow_unused=True)
    buffers_before.restore()
    return any(gradient is None for gradient in gradients)
