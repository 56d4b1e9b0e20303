"""Copies of a model's buffers, to return to: a forward pass in training mode changes the statistics of batch norms.

All buffers of a device and dtype are copied by one call. On a GPU, launching a copy takes longer than the copy itself,
and a model has dozens of them.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SavedBuffers:
    """The values that the buffers of `model` have now. Their memory is allocated once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values = [buffer.clone() for buffer in model.buffers()]

    def save(self) -> None:
        """Replace the values by those of the buffers."""
        copy_all(self._values, self._model.buffers())

    def restore(self) -> None:
        """Copy the values back into the buffers."""
        copy_all(self._model.buffers(), self._values)


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each of `sources` into its tensor of `targets`, which has the same shape, dtype and device."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in zip(targets, sources, strict=True):
        groups[target.device, target.dtype].append((target, source))
    for pairs in groups.values():  # mixed dtypes would be copied one by one
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
