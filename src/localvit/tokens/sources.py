"""Where a host knows its patch grid: one small class for each kind of place.

A source registers hooks on a module of the host that record the grid in each forward pass (see `localvit.tokens.grid`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localvit.tokens.grid import Grid, Size


class GridSource(ABC):
    """A place in a host that knows the patch grid. Sites that share a source share a `Grid`."""

    module: nn.Module | None
    """The module that hooks are registered on; None where the grid never changes."""

    def new_grid(self) -> Grid:
        """A grid for this source, which is not connected yet."""
        return Grid()

    @abstractmethod
    def connect(self, grid: Grid) -> None:
        """Register hooks that record the grid in each forward pass from now on."""


@dataclass(frozen=True, eq=False)
class FixedGrid(GridSource):
    """A grid that is fixed when the host is created."""

    size: Size
    module: None = field(default=None, init=False)

    def new_grid(self) -> Grid:
        return Grid(self.size)

    def connect(self, grid: Grid) -> None:
        pass


@dataclass(frozen=True, eq=False)
class OutputMap(GridSource):
    """`module` returns a map of patches, such as the convolution of a patch embedding."""

    module: nn.Module
    height_dim: int = 2
    """The map's height dimension, which the width follows: 2 for (B, C, H, W), 1 for (B, H, W, C)."""
    within: nn.Module | None = None
    """A module that contains `module` and may get another one in its place, as `set_input_size(patch_size=...)` does:
    when it starts, a grid left over is forgotten, and another module that returns a map is followed from then on."""

    def connect(self, grid: Grid) -> None:
        self.module.register_forward_hook(partial(_record_output, grid, self.height_dim))
        if self.within is not None:
            name = next(name for name, module in self.within.named_modules() if module is self.module)
            self.within.register_forward_pre_hook(partial(_follow, grid, name, self.height_dim))


@dataclass(frozen=True, eq=False)
class InputMap(GridSource):
    """The first argument of `module` is a map of patches."""

    module: nn.Module
    height_dim: int = 1
    """The map's height dimension, which the width follows: 1 for (B, H, W, C), 2 for (B, C, H, W)."""

    def connect(self, grid: Grid) -> None:
        self.module.register_forward_pre_hook(partial(_record_input, grid, self.height_dim))


@dataclass(frozen=True, eq=False)
class ArgumentsGrid(GridSource):
    """The grid follows from the arguments of `module`."""

    module: nn.Module
    read: Callable[..., Any]
    """Called with the arguments; returns (height, width)."""

    def connect(self, grid: Grid) -> None:
        self.module.register_forward_pre_hook(partial(_record_arguments, grid, self.read), with_kwargs=True)


@dataclass(frozen=True, eq=False)
class ResultGrid(GridSource):
    """The grid follows from what `module` returns."""

    module: nn.Module
    read: Callable[[Any], Size]
    """Called with the result; returns (height, width)."""

    def connect(self, grid: Grid) -> None:
        self.module.register_forward_hook(partial(_record_result, grid, self.read))


def enclose_calls(module: nn.Module, grid: Grid) -> None:
    """Give each call of `module`, nested ones too, a grid of its own, and the previous one back after it."""
    module.register_forward_pre_hook(partial(_begin, grid), prepend=True)
    module.register_forward_hook(partial(_end, grid), always_call=True)


def recognize_inputs(block: nn.Module, grid: Grid) -> None:
    """Let gradient checkpointing run `block` again on the grid of its forward pass."""
    block.register_forward_pre_hook(partial(_remember_input, grid), with_kwargs=True)


def disconnect(model: nn.Module) -> None:
    """Remove every hook that this file registered from the modules of `model`."""
    _remove_hooks(model, is_grid_hook)


def is_grid_hook(hook: Any) -> bool:
    """Whether this file registered a hook, which records a grid and leaves the tokens as they are."""
    return isinstance(hook, partial) and len(hook.args) > 0 and isinstance(hook.args[0], Grid)


def stop_recognizing_inputs(model: nn.Module) -> None:
    """Undo `recognize_inputs` in all blocks of `model`."""
    _remove_hooks(model, lambda hook: isinstance(hook, partial) and hook.func is _remember_input)


def _remove_hooks(model: nn.Module, which: Callable[[Any], bool]) -> None:
    for module in model.modules():
        for hooks, others in (
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        ):
            for key in [key for key, hook in hooks.items() if which(hook)]:
                for each in (hooks, *others):
                    each.pop(key, None)


def _record_output(grid: Grid, height_dim: int, module: nn.Module, args: tuple, map: Tensor) -> Tensor:
    return grid(map, height_dim)


def _record_input(grid: Grid, height_dim: int, module: nn.Module, args: tuple) -> tuple:
    return (grid(args[0], height_dim), *args[1:])


def _record_arguments(grid: Grid, read: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict) -> None:
    grid.record(read(*args, **kwargs))


def _record_result(grid: Grid, read: Callable[[Any], Size], module: nn.Module, args: tuple, result: Any) -> None:
    grid.record(read(result))


def _follow(grid: Grid, name: str, height_dim: int, module: nn.Module, args: tuple) -> None:
    grid.forget()
    if torch.compiler.is_compiling():
        return
    current = module.get_submodule(name)
    hooks = current._forward_hooks.values()
    if not any(isinstance(hook, partial) and hook.args and hook.args[0] is grid for hook in hooks):
        current.register_forward_hook(partial(_record_map, grid, height_dim))


def _record_map(grid: Grid, height_dim: int, module: nn.Module, args: tuple, result: Any) -> Any:
    """Record the grid of a replaced module, if it returns a map: what else it returns tells no grid."""
    return grid(result, height_dim) if isinstance(result, Tensor) and result.ndim == 4 else result


def _begin(grid: Grid, module: nn.Module, args: tuple) -> None:
    grid.begin()


def _end(grid: Grid, module: nn.Module, args: tuple, result: Any) -> None:
    grid.end()


def _remember_input(grid: Grid, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            grid.remember_input(x)
