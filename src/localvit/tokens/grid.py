"""The patch grid of the forward pass in progress, and how it reaches the layers that need it.

The grid is never derived from the number of tokens only: the host's patch embedding or block supplies it in each
forward pass (`localvit.tokens.sources`), and a `Grid` hands it to the layers. Gradient checkpointing runs blocks again
in the backward pass, which may run in another thread; a block then gets the grid of its own forward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from localvit.tokens.per_call import PerCall

Size = tuple[int, int]
"""Height and width of a grid, in tokens."""


class Grid(nn.Module):
    """Hands the patch grid from the module of a host that knows it to the layers that need it.

    A `GridSource` records the grid in each forward pass; `size_for` reads it. Every thread and every nested call of
    the host has its own, so one model may run on images of several sizes at once. Where the grid is not known for
    sure, reading it raises. This holds for `host(images)`; where a method such as `forward_features` is called
    instead, and a hook in it calls such a method again, the last grid recorded counts.

    A block that gradient checkpointing runs again is recognized by the memory of its input, which checkpointing
    keeps. Otherwise (the input was moved, a part of a block was checkpointed, or the block is compiled) the number
    of tokens must fit exactly one of all grids seen so far. A compiled block reads what its thread recorded last, if
    that forward pass was not a call of the host.

    A `Grid` is a module, without parameters, so that graph tracers keep the recording in the graph.

    Args:
        fixed: the grid of a host that takes one image size only; None where a source records it.
    """

    def __init__(self, fixed: Size | None = None) -> None:
        super().__init__()
        self.fixed = fixed
        self.calls = PerCall()
        self.history = _History()

    @property
    def size(self) -> Any:
        """What is recorded in the forward pass in progress: (height, width), None if nothing is or several are."""
        candidates = self._candidates()
        return candidates[0] if len(candidates) == 1 else None

    def size_for(self, image_tokens: int, num_prefix_tokens: int = 0) -> Size:
        """Height and width of the grid that these image tokens fill; prefix tokens are counted apart.

        Raises ValueError when no grid is recorded, the tokens do not fill it, or several recorded grids fit.
        """
        candidates = self._candidates() or self._seen_by_others()
        fitting = [size for size in candidates if size[0] * size[1] == image_tokens]
        if len(fitting) == 1:
            return fitting[0]
        prefix = f" ({num_prefix_tokens} prefix tokens left out)" if num_prefix_tokens else ""
        raise ValueError(_problem(f"{image_tokens} image tokens{prefix}", candidates, fitting))

    def forward(self, map: Tensor, height_dim: int) -> Tensor:
        """Record the grid of a map whose height is dimension `height_dim` and whose width follows; returns the map."""
        self.record((map.shape[height_dim], map.shape[height_dim + 1]))
        return map

    def record(self, size: Any) -> None:
        """Record the grid of the forward pass in progress.

        A second grid within one call of the host comes from a nested forward pass. Both are kept then, and the
        number of tokens decides.
        """
        forward, task, in_backward = self.calls.value or ((), -1, ())
        current = _backward_task()
        if current == -1:
            forward = self._with(forward, size)
        else:
            task, in_backward = current, self._with(in_backward if task == current else (), size)
        self.calls.value = (forward, task, in_backward)
        if not torch.compiler.is_compiling():
            self.history.add(size)

    def begin(self) -> None:
        """Start a call of the host: nothing is recorded in it yet."""
        self.calls.begin()

    def end(self) -> None:
        """End a call of the host. What was recorded before it counts again."""
        self.calls.end()

    def forget(self) -> None:
        """Forget the last grid, unless a call of the host is in progress, which knows its own."""
        if not self.calls.outer:
            self.calls.value = None

    def remember_input(self, x: Tensor) -> None:
        """Remember which grid the input of a block belongs to or, in a backward pass, record that grid again."""
        task = _backward_task()
        if task == -1:
            if len(candidates := self._candidates()) == 1:
                self.history.add_input(x, candidates[0])
        elif (size := self.history.size_of_input(x)) is not None:
            forward, _, _ = self.calls.value or ((), -1, ())
            self.calls.value = (forward, task, (size,))

    def _with(self, candidates: tuple[Any, ...], size: Any) -> tuple[Any, ...]:
        if not self.calls.outer or not candidates:
            return (size,)
        return candidates if size in candidates else (*candidates, size)

    def _candidates(self) -> tuple[Any, ...]:
        """The grids recorded in this thread's forward pass, or in the backward pass that runs in this thread."""
        if self.fixed is not None:
            return (self.fixed,)
        if self.calls.value is None:
            return ()
        forward, task, in_backward = self.calls.value
        current = _backward_task()
        if current == -1:
            return forward
        return in_backward if task == current else ()

    def _seen_by_others(self) -> tuple[Any, ...]:
        """For a recomputation whose input is not recognized: every grid seen so far, in any thread."""
        if self.history.has_placements:  # Padding may add up to the number of tokens of another image.
            return ()
        return tuple(self.history.sizes) if torch.compiler.is_compiling() or _backward_task() != -1 else ()


def _problem(tokens: str, candidates: tuple[Size, ...], fitting: list[Size]) -> str:
    if not candidates:
        return (
            f"no patch grid is recorded for {tokens}: run the whole model, not one of its blocks; a block that was "
            "copied from a localized model by itself has lost its grid: copy the whole model"
        )
    grids = " and ".join(f"{height} x {width}" for height, width in fitting or candidates)
    if fitting:
        return (
            f"{tokens} fill several grids that this model was run on, {grids}, and it is not known which one is "
            "theirs: call model(images) in hooks, not its other methods, and checkpoint whole blocks"
        )
    areas = " and ".join(str(height * width) for height, width in candidates)
    return f"{tokens} do not fill the {grids} grid of {areas}: were some masked or dropped?"


class _History:
    """The grids that a model was run on, and which grid each block input that is still in memory belongs to.

    Shared by all threads; a copy starts empty. Every operation on its dictionaries is a single, atomic one.
    """

    def __init__(self) -> None:
        self.sizes: dict[Any, None] = {}
        self.inputs: dict[tuple, tuple[StorageWeakRef, Any]] = {}
        self.has_placements = False

    def __reduce__(self) -> tuple[type["_History"], tuple[()]]:
        return type(self), ()

    def add(self, size: Any) -> None:
        for key, (storage, _) in list(self.inputs.items()):
            if storage.expired():
                self.inputs.pop(key, None)
        if not isinstance(size, tuple):  # A placement, see `localvit.tokens.ragged`.
            self.has_placements = True
        elif all(type(length) is int for length in size):  # Some tracers have symbols in their place.
            self.sizes[size] = None

    def add_input(self, x: Tensor, size: Any) -> None:
        if key := _memory_of(x):
            known, same = self.inputs.get(key, (None, size))
            ambiguous = known is not None and not known.expired() and same != size
            self.inputs[key] = (StorageWeakRef(x.untyped_storage()), None if ambiguous else size)

    def size_of_input(self, x: Tensor) -> Any:
        storage, size = self.inputs.get(_memory_of(x) or (), (None, None))
        return None if storage is None or storage.expired() else size


def _memory_of(x: Tensor) -> tuple | None:
    """Identifies a tensor's memory as long as a weak reference to it is held; None for tensors that have none."""
    try:
        return (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape))
    except (NotImplementedError, RuntimeError):  # A tensor of torch.func, for instance.
        return None


def _backward_task() -> int:
    """The number of the backward pass that runs in this thread, -1 outside of one and in compiled code."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
