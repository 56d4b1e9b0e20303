"""The patch grid of the forward under way, and how it reaches the layers that need it.

The grid is never guessed from the number of tokens: the host's patch embedding (or block) says what it is in each
forward, and a `Grid` carries that to the slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Grid(nn.Module):
    """Carries the patch grid of the forward under way from where it is known to the slots that need it.

    One of its `follow_` methods hangs it on the module of the host that knows. It is a module, though without
    parameters, so that graph tracers keep the note-taking in the graph and `deepcopy` keeps the sharing. `size` is
    (H, W), None before the first forward; give it where it never changes.

    It holds one grid, that of the last forward. Gradient checkpointing runs blocks again in the backward pass: where a
    step mixes image sizes, go backward through one before forward through the next.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.size = size
        self.height_dim = 1
        self.read: Callable[..., tuple[int, int] | None] | None = None

    def forward(self, map: Tensor) -> Tensor:
        """Note the grid of a map, (B, H, W, C) or, where `height_dim` is 2, (B, C, H, W); returns the map."""
        self.size = (map.shape[self.height_dim], map.shape[self.height_dim + 1])
        return map

    def follow_output(self, module: nn.Module, height_dim: int = 1) -> None:
        """Note the grid whenever `module`, which returns a map, has run."""
        self.height_dim = height_dim
        module.register_forward_hook(self._note_output)

    def follow_input(self, module: nn.Module, height_dim: int = 1) -> None:
        """Note the grid whenever `module`, which reads a map first, is about to run."""
        self.height_dim = height_dim
        module.register_forward_pre_hook(self._note_input)

    def follow_arguments(self, module: nn.Module, read: Callable[..., tuple[int, int] | None]) -> None:
        """Note `read(*args, **kwargs)` whenever `module` is about to run with these arguments."""
        self.read = read
        module.register_forward_pre_hook(self._note_arguments, with_kwargs=True)

    def follow_result(self, module: nn.Module, read: Callable[..., tuple[int, int] | None]) -> None:
        """Note `read(result)` whenever `module` has run."""
        self.read = read
        module.register_forward_hook(self._note_result)

    def forget_before(self, module: nn.Module) -> None:
        """Forget the grid whenever `module` is about to run: what is followed may have been replaced in it."""
        module.register_forward_pre_hook(self._forget)

    def _forget(self, module: nn.Module, args: tuple) -> None:
        self.size = None

    def _note_output(self, module: nn.Module, args: tuple, map: Tensor) -> Tensor:
        return self(map)

    def _note_input(self, module: nn.Module, args: tuple) -> tuple:
        return (self(args[0]), *args[1:])

    def _note_arguments(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert self.read
        self.size = self.read(*args, **kwargs)

    def _note_result(self, module: nn.Module, args: tuple, result: Any) -> None:
        assert self.read
        self.size = self.read(result)


def stop_following(model: nn.Module) -> None:
    """Take every `Grid` off the modules that it follows."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Grid):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


@dataclass(frozen=True, eq=False)
class GridSource:
    """The place in a host that knows the patch grid; sites that share one share a `Grid`."""

    module: nn.Module | None
    """The module to follow; None where the grid never changes."""
    follow: str = "follow_output"
    """The `Grid` method that follows it."""
    how: Any = 1
    """That method's last argument: the dimension of the height, or a function. Without a module, the grid itself."""
    within: nn.Module | None = None
    """What runs the module each time, and may come to run another one: the grid is forgotten when it begins."""

    def grid(self) -> Grid:
        """A `Grid` for this source, which does not follow it yet."""
        return Grid(self.how if self.module is None else None)

    def hang(self, grid: Grid) -> None:
        """Make the grid follow the source from now on."""
        if self.module is not None:
            getattr(grid, self.follow)(self.module, self.how)
        if self.within is not None:
            grid.forget_before(self.within)


def static_grid(size: tuple[int, int]) -> GridSource:
    """A source for hosts whose grid is fixed when they are made."""
    return GridSource(None, how=size)


def patch_map(convolution: nn.Module, embedding: nn.Module | None = None) -> GridSource:
    """The map (B, C, H, W) that the convolution of a patch embedding returns: right for every image size."""
    return GridSource(convolution, "follow_output", 2, within=embedding)
