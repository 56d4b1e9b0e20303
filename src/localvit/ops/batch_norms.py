"""The running statistics of batch norms: each batch counts once, and a batch that raises does not count.

torch updates them in each forward in training mode: also when gradient checkpointing runs a forward again in the
backward pass, and in the norms before the one that refuses a batch with a single value per channel. Inside a function
transform (torch.func) it refuses every update of a tensor that is not an argument of the transformed function.

Shapes: B batch, C channels, H and W the map.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm

from localvit.ops.stages import ChannelGate, is_plain


class Running(NamedTuple):
    """What a batch norm updates in training."""

    mean_C: Tensor
    variance_C: Tensor
    num_batches_tracked: Tensor


def run_layers(layers: nn.Module, map_BCHW: Tensor) -> Tensor:
    """`layers(map_BCHW)`, where batch norms in training mode update their running statistics once per batch.

    Within a function transform they update only statistics that `functional_call` was given as an argument of the
    transformed function: the others must not change there.

    Raises:
        ValueError: for a batch that leaves a batch norm a single value per channel. No statistics have changed then.
    """
    if torch.compiler.is_compiling() or not is_plain(map_BCHW) or torch.jit.is_tracing():
        return layers(map_BCHW)
    parts = list(layers) if isinstance(layers, nn.Sequential) else [layers]
    if leaves_single_values(parts, map_BCHW):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got one image and a map of "
            f"{tuple(map_BCHW.shape)}: train with more images in each batch, or with larger ones"
        )
    if is_recomputation():
        # Copies, not None: checkpointing compares the tensors that both forwards save.
        with _statistics_replaced(layers, torch.clone):
            return layers(map_BCHW)
    if torch._C._are_functorch_transforms_active():
        with _statistics_replaced(layers, _argument_or_none):
            return layers(map_BCHW)
    return layers(map_BCHW)


def is_recomputation() -> bool:
    """Whether a backward pass runs in this thread: a forward then repeats one of gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def leaves_single_values(layers: list[nn.Module], map_BCHW: Tensor) -> bool:
    """Whether one of the batch norms would normalize a single value per channel, which has no variance."""
    batch, _, height, width = map_BCHW.shape
    if batch != 1:
        return False
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
            height, width = (_convolved(layer, axis, size) for axis, size in enumerate((height, width)))
        elif isinstance(layer, nn.BatchNorm2d):  # SyncBatchNorm counts the values of all processes.
            if layer.training and height * width == 1:
                return True
        elif not isinstance(layer, ChannelGate) and type(layer).__module__ != activation.__name__:
            return False  # What it does to the map is not known.
    return False


def _convolved(conv: nn.Conv2d, axis: int, size: int) -> int:
    padding: Any = conv.padding
    return (size + 2 * padding[axis] - conv.dilation[axis] * (conv.kernel_size[axis] - 1) - 1) // conv.stride[axis] + 1


@contextmanager
def _statistics_replaced(layers: nn.Module, replacement: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Let batch norms in training mode update `replacement` of each running statistic; None where they keep none."""
    norms = [norm for norm in layers.modules() if isinstance(norm, _BatchNorm) and norm.training]
    own = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in own:
        setattr(norm, name, replacement(buffer))
    try:
        yield
    finally:
        for norm, name, buffer in own:
            setattr(norm, name, buffer)


def _argument_or_none(buffer: Tensor) -> Tensor | None:
    """The buffer if it is an argument of the innermost function transform."""
    return buffer if functorch.maybe_get_level(buffer) == functorch.maybe_current_level() else None
