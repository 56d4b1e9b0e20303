"""A locality module's layers, read as stages: only layers whose computation is known exactly make a stage.

Shapes: B batch, E channels, H and W the patch grid.
"""

from collections.abc import Iterator
from types import NoneType
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from localvit.ops.activations import activation_name


class ChannelGate(nn.Module):
    """Base class of gates that multiply each channel of a map (B, E, H, W) by a factor computed from channel means.

    Subclasses define `scale` and leave `forward` as it is, so that the faster paths can call `scale` directly.
    """

    def scale(self, mean_BE: Tensor) -> Tensor:
        """The factor (B, E) of each channel, given the mean of each channel over the map."""
        raise NotImplementedError

    def linear_layers(self) -> tuple[nn.Linear, nn.Linear] | None:
        """The layers of a squeeze-and-excitation gate with ReLU between and a hard sigmoid after them; else None."""
        return None

    def convolution_layers(self) -> tuple[nn.Conv1d, nn.Module] | None:
        """The layers of an ECA gate, a convolution over channels and a sigmoid or hard sigmoid; else None."""
        return None

    def forward(self, map_BEHW: Tensor) -> Tensor:
        return map_BEHW * self.scale(map_BEHW.mean((2, 3)))[:, :, None, None]


def channel_means(map_BHWE: Tensor) -> Tensor:
    """The mean of each channel over the map of each image, (B, E): the input of a gate's `scale`."""
    if map_BHWE.dtype != torch.bfloat16:
        return map_BHWE.mean((1, 2))
    # torch's bfloat16 mean takes six times as long as its sum on the CPU, and no sum leaves this dtype's range.
    return map_BHWE.flatten(1, 2).sum(1) / (map_BHWE.shape[1] * map_BHWE.shape[2])


Norm = nn.BatchNorm2d | nn.SyncBatchNorm
"""A batch norm that the faster paths know."""


class Stage(NamedTuple):
    """Batch norm, activation, an optional gate, and the convolution that reads their output."""

    norm: Norm
    act: str
    """The activation's name, one of `localvit.ops.activations.ACTIVATIONS`."""
    gate: ChannelGate | None
    conv: nn.Conv2d


class Stages(NamedTuple):
    """A locality module: the first convolution, the stages that follow, and the last batch norm."""

    first: nn.Conv2d
    stages: tuple[Stage, ...]
    last_norm: Norm


def stages_of(layers: nn.Sequential) -> Stages | None:
    """The stages of a locality module's layers; None unless every layer computes exactly what its class defines.

    A subclass (fake quantization, LoRA, parametrization) of a layer or a weight, a bias, a dilation, another activation
    or norm, a hook on any layer or on all modules, and a `forward` replaced on an instance all give None: the layers
    must run then.
    """
    if has_global_hooks() or type(layers) is not nn.Sequential or not is_untouched(layers):
        return None
    remaining = iter(layers)
    first = next(remaining, None)
    if not _is_known_conv(first):
        return None
    stages: list[Stage] = []
    norm = next(remaining, None)
    while _is_known_norm(norm):
        activation = next(remaining, None)
        if activation is None:
            return Stages(first, tuple(stages), norm)
        if (stage := _stage(norm, activation, remaining)) is None:
            return None
        stages.append(stage)
        norm = next(remaining, None)
    return None


def is_untouched(module: nn.Module) -> bool:
    """Whether a module has no hooks, forward or backward, and no `forward` of its own instance."""
    return not has_hooks(module) and "forward" not in module.__dict__


def parameters_of(layer: nn.Module) -> tuple[Tensor, ...]:
    """A layer's own parameters, weight before bias, in a tenth of the time of asking for each by its name."""
    return tuple(layer._parameters.values())  # type: ignore[arg-type]  # None only where a layer has no bias


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is not of a subclass (DTensor, quantized, fake), whose operations may mean something else."""
    return type(tensor) in (nn.Parameter, Tensor, NoneType)


def has_global_hooks() -> bool:
    """Whether hooks are registered for all modules, such as by `torch.nn.modules.module.register_module_forward_hook`.

    They must see every layer run.
    """
    return bool(torch_module._has_any_global_hook())


def _stage(norm: Norm, activation: nn.Module, remaining: Iterator[nn.Module]) -> Stage | None:
    act = activation_name(activation)
    layer = next(remaining, None)
    gate = None
    if isinstance(layer, ChannelGate):
        gate, layer = layer, next(remaining, None)
    if act is None or not is_untouched(activation) or not _is_known_conv(layer):
        return None
    return Stage(norm, act, gate, layer) if gate is None or _is_known_gate(gate) else None


def _is_known_conv(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a pointwise or depth-wise convolution as the locality module makes them."""
    if type(layer) is not nn.Conv2d or not is_untouched(layer) or not _has_plain_weights(layer):
        return False
    if layer.bias is not None:
        return False
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    if layer.groups == 1:
        return (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))
    return layer.groups == layer.in_channels == layer.out_channels


def _is_known_norm(layer: nn.Module | None) -> TypeGuard[Norm]:
    if not isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
        return False
    return type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm) and is_untouched(layer) and _has_plain_weights(layer)


def _has_plain_weights(layer: nn.Module) -> bool:
    return all(map(is_plain, layer._parameters.values()))


_GATE_PARTS = (nn.Sequential, nn.Linear, nn.Conv1d, nn.ReLU, nn.Hardsigmoid, nn.Sigmoid)
"""Layers of gates that compute the same each time, as recomputing needs (a dropout does not)."""


def _is_known_gate(gate: ChannelGate) -> bool:
    return type(gate).forward is ChannelGate.forward and is_untouched(gate) and _computes_the_same_each_time(gate)


def _computes_the_same_each_time(module: nn.Module) -> bool:
    for part in module._modules.values():
        if part is None or type(part) not in _GATE_PARTS or not is_untouched(part) or not _has_plain_weights(part):
            return False
        if not _computes_the_same_each_time(part):
            return False
    return True
