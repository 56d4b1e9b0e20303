"""Tokens to map and back, by one grid rule, and the locality module in a transformer's feed-forward slot.

The grid is never guessed from the number of tokens: the host's patch embedding (or block) says what it is in each
forward, a `Grid` carries that to the slots, and a count that does not fill it is an error.

Shapes: B batch, N tokens (prefix tokens first), P prefix tokens (class, distillation, register), C channels, H and W
the grid.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from localvit.fused import FusedConvolutions
from localvit.locality import LocalityFeedForward


def tokens_to_map(x_BNC: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """View the image tokens of (B, P + H * W, C) as a channels-last map (B, C, H, W), without a copy.

    Raises ValueError, saying both numbers, when the image tokens do not fill the grid.
    """
    height, width = grid_size
    image_tokens = x_BNC.shape[1] - num_prefix_tokens
    if image_tokens != height * width:
        raise ValueError(
            f"{image_tokens} image tokens ({num_prefix_tokens} prefix tokens left out) do not fill "
            f"the {height} x {width} grid of {height * width}"
        )
    return x_BNC[:, num_prefix_tokens:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def map_to_tokens(map_BCHW: Tensor) -> Tensor:
    """View a map (B, C, H, W) as its tokens (B, H * W, C); no copy for a channels-last map."""
    return map_BCHW.flatten(2).transpose(1, 2)


class Grid(nn.Module):
    """Carries the patch grid of the forward under way from where it is known to the slots that need it.

    One of its `follow_` methods hangs it on the module of the host that knows. It is a module, though without
    parameters, so that graph tracers keep the note-taking in the graph and `deepcopy` keeps the sharing. `size` is
    (H, W), None before the first forward; give it where it never changes.

    It holds one grid, that of the last forward. Gradient checkpointing runs blocks again in the backward pass: where a
    step mixes picture sizes, go backward through one before forward through the next.
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


class TokenSequence(nn.Module):
    """Tokens (B, P + H * W, C), row by row, behind prefix tokens: the layout of most vision transformers.

    A layout says how tokens make a map: `to_map` gives the image tokens as (B, C, H, W), `to_tokens` puts such a map
    back, with zeros for what is no image token, so that it can be added to the tokens. Without parameters. Where maps
    may have places without a token, `has_empty_places` is true.

    Args:
        grid: the grid of the tokens, noted by the host before they come.
        num_prefix_tokens: how many leading tokens are no patches.
    """

    def __init__(self, grid: Grid, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens

    def to_map(self, x_BNC: Tensor) -> Tensor:
        """The image tokens as a channels-last map, a view. Raises ValueError when they do not fill the noted grid."""
        if self.grid.size is None:
            raise ValueError(
                f"no patch grid was noted for these {x_BNC.shape[1]} tokens: run the whole model, not a block"
            )
        return tokens_to_map(x_BNC, self.grid.size, self.num_prefix_tokens)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as tokens (B, P + H * W, C), zero for prefix tokens."""
        x_BNC = map_to_tokens(map_BCHW)
        return F.pad(x_BNC, (0, 0, self.num_prefix_tokens, 0)) if self.num_prefix_tokens else x_BNC


class ChannelsLastMap(nn.Module):
    """Tokens that lie as a map already, (B, H, W, C): the layout of blocks that never flatten them. Needs no grid."""

    def __init__(self, grid: None = None) -> None:
        super().__init__()

    def to_map(self, x_BHWC: Tensor) -> Tensor:
        """The map (B, C, H, W), a view."""
        return x_BHWC.permute(0, 3, 1, 2)

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map as (B, H, W, C), a view."""
        return map_BCHW.permute(0, 2, 3, 1)


class ChannelsFirstMap(nn.Module):
    """A map (B, C, H, W): the layout of feed-forwards made of 1x1 convolutions. Needs no grid."""

    def __init__(self, grid: None = None) -> None:
        super().__init__()

    def to_map(self, map_BCHW: Tensor) -> Tensor:
        """The map itself."""
        return map_BCHW

    def to_tokens(self, map_BCHW: Tensor) -> Tensor:
        """The map itself."""
        return map_BCHW


def refuse_empty_places(layout: nn.Module, part: str) -> None:
    """Raise ValueError, naming the `part` that takes means over maps, for a layout whose maps have empty places."""
    if getattr(layout, "has_empty_places", False):
        raise ValueError(
            f"{part} takes means over whole maps, but pictures of several shapes share these, and the places that they "
            "leave empty would count: only a branch without gate and batch norm can work on them"
        )


class LocalityMlp(LocalityFeedForward):
    """The locality module as a transformer's feed-forward: tokens in and out, of any layout.

    The host adds the residual, so this returns what is to be added: the module without its own shortcut for the image
    tokens, zero for prefix tokens, which the paper lets pass untouched. There is no norm before it and no stochastic
    depth after it (the host's are to be removed).

    Args:
        dim: channels C.
        layout: how the tokens lie on the patch grid, such as `TokenSequence(grid, num_prefix_tokens)`.
        expand_ratio, act, reduction: as in `LocalityFeedForward`.
        depthwise: False leaves the depth-wise convolution out (`wo_dp_conv`).
        depthwise_first: True puts it before the expansion (`dp_first`).

    Raises:
        ValueError: as `LocalityFeedForward`; in forward, when the tokens do not fill the grid, none was noted, or
            the map has empty places.
    """

    def __init__(
        self,
        dim: int,
        layout: nn.Module,
        *,
        expand_ratio: float = 4.0,
        act: str | int = "hs+se",
        reduction: int = 4,
        depthwise: bool = True,
        depthwise_first: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            dim, dim, 1, expand_ratio, act, reduction, not depthwise, depthwise_first, device=device, dtype=dtype
        )
        self.layout: Any = layout

    def fuse(self) -> nn.Module:
        """As `LocalityFeedForward.fuse`."""
        self._check_evaluation()
        return FusedMlp(self.conv, self.layout)

    def forward(self, x: Tensor) -> Tensor:
        refuse_empty_places(self.layout, "the paper's form")
        return self.layout.to_tokens(self.conv(self.layout.to_map(x)))


class FusedMlp(nn.Module):
    """`LocalityMlp` in its inference form (see `localvit.fused`): tokens in and out, of any layout.

    Raises ValueError in forward as `LocalityMlp` does.
    """

    def __init__(self, layers: nn.Sequential, layout: nn.Module) -> None:
        super().__init__()
        self.conv = FusedConvolutions(layers)
        self.layout: Any = layout

    def forward(self, x: Tensor) -> Tensor:
        refuse_empty_places(self.layout, "the paper's form")
        out_BHWC = self.conv(self.layout.to_map(x).permute(0, 2, 3, 1))
        return self.layout.to_tokens(out_BHWC.permute(0, 3, 1, 2))
