"""The locality module in a transformer's feed-forward slot: tokens in and out.

Shapes: B batch, N tokens (prefix tokens first), C channels, H and W the grid.
"""

from typing import Any

from torch import Tensor, nn

from localvit.locality import LocalityFeedForward
from localvit.ops.folded import FusedConvolutions
from localvit.tokens.layouts import refuse_empty_places


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
    """`LocalityMlp` in its inference form (see `localvit.ops.folded`): tokens in and out, of any layout.

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
