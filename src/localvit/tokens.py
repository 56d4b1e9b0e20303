"""Tokens to map and back, by one grid rule, and the locality module in a transformer's feed-forward slot.

The grid is never guessed from the number of tokens: the host's patch embedding (or block) says what it is in each
forward, a `Grid` carries that to the slots, and a count that does not fill it is an error.

Shapes: B batch, N tokens (prefix tokens first), P prefix tokens (class, distillation), C channels, H and W the grid.
"""

import torch.nn.functional as F
from torch import Tensor, nn

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

    Called with a channels-last tensor (B, H, W, C), it notes (H, W) and returns the tensor. `follow_output` and
    `follow_input` hang it on a module of the host. It is a module, though without parameters, so that graph tracers
    keep the note-taking in the graph and `deepcopy` keeps the sharing.

    It holds one grid, that of the last forward. Gradient checkpointing runs blocks again in the backward pass: where a
    step mixes picture sizes, go backward through one before forward through the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size: tuple[int, int] | None = None

    def forward(self, x_BHWC: Tensor) -> Tensor:
        self.size = (x_BHWC.shape[1], x_BHWC.shape[2])
        return x_BHWC

    def follow_output(self, module: nn.Module) -> None:
        """Note the grid whenever `module`, a patch embedding that returns (B, H, W, C), has run."""
        module.register_forward_hook(self._note_output)

    def follow_input(self, module: nn.Module) -> None:
        """Note the grid whenever `module`, a block that reads (B, H, W, C), is about to run."""
        module.register_forward_pre_hook(self._note_input)

    def _note_output(self, module: nn.Module, args: tuple, x_BHWC: Tensor) -> Tensor:
        return self(x_BHWC)

    def _note_input(self, module: nn.Module, args: tuple) -> tuple:
        return (self(args[0]), *args[1:])


class LocalityMlp(LocalityFeedForward):
    """The locality module as a transformer's feed-forward: tokens (B, P + H * W, C) in and out.

    The host adds the residual, so this returns what is to be added: the module without its own shortcut for the image
    tokens, zero for prefix tokens, which the paper lets pass untouched. There is no norm before it and no stochastic
    depth after it (the host's are to be removed).

    Args:
        dim: channels C.
        grid: the grid of the tokens, noted by the host before this runs.
        num_prefix_tokens: how many leading tokens are no patches.
        expand_ratio, act, reduction: as in `LocalityFeedForward`.
        depthwise: False leaves the depth-wise convolution out (`wo_dp_conv`).
        depthwise_first: True puts it before the expansion (`dp_first`).

    Raises:
        ValueError: as `LocalityFeedForward`; in forward, when the tokens do not fill the grid or none was noted.
    """

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_prefix_tokens: int = 0,
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
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x_BNC: Tensor) -> Tensor:
        if self.grid.size is None:
            raise ValueError(
                f"no patch grid was noted for these {x_BNC.shape[1]} tokens: run the whole model, not a block"
            )
        map_BCHW = tokens_to_map(x_BNC, self.grid.size, self.num_prefix_tokens)
        return F.pad(map_to_tokens(self.conv(map_BCHW)), (0, 0, self.num_prefix_tokens, 0))
