"""The locality module in a transformer's feed-forward slot: tokens in and out.

Shapes: B batch, N tokens (prefix tokens first), C channels, H and W the grid.
"""

import torch
from torch import Tensor, nn

from localvit import ops
from localvit.locality import LocalityFeedForward
from localvit.tokens.layouts import Layout, TokenSequence, refuse_empty_positions


class LocalityMlp(LocalityFeedForward):
    """The locality module as a transformer's feed-forward: tokens in and out, in any layout.

    The host adds the residual, so this returns only what is added: the module without its own shortcut for the image
    tokens, zero for prefix tokens, which the paper leaves unchanged. The host's norm before it and stochastic depth
    after it are removed.

    Args:
        dim: channels C.
        layout: how the tokens lie on the patch grid, such as `TokenSequence(grid, num_prefix_tokens)`.
        expand_ratio, act, reduction: as in `LocalityFeedForward`.
        depthwise: False leaves out the depth-wise convolution (`wo_dp_conv`).
        depthwise_first: True places it before the expansion (`dp_first`).

    Raises:
        ValueError: as `LocalityFeedForward`; in forward, when the tokens do not fill the grid, the grid is not known,
            or the map has empty positions.
    """

    def __init__(
        self,
        dim: int,
        layout: Layout,
        *,
        expand_ratio: float = 4.0,
        act: str | int = "hs+se",
        reduction: int = 4,
        depthwise: bool = True,
        depthwise_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, dim, 1, expand_ratio, act, reduction, not depthwise, depthwise_first, device=device, dtype=dtype
        )
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        refuse_empty_positions(self.layout, "the paper's module")
        return self.layout.to_tokens(ops.feed_forward(self.conv, self.layout.to_map(x)))

    def fuse(self) -> nn.Module:
        """As `LocalityFeedForward.fuse`."""
        stages = ops.stages_to_fold(self, self.conv) if type(self) is LocalityMlp else None
        return self if stages is None else FusedMlp(stages, self.layout)


class FusedMlp(nn.Module):
    """`LocalityMlp` in a fused model (see `localvit.ops.folded`): tokens in and out, in any layout.

    Raises:
        ValueError: in forward, as `LocalityMlp`.
    """

    def __init__(self, stages: ops.Stages, layout: Layout) -> None:
        super().__init__()
        self.conv = ops.FusedConvolutions(stages)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        refuse_empty_positions(self.layout, "the paper's module")
        if type(self.layout) is TokenSequence:
            prefix = self.layout.num_prefix_tokens
            return self.conv.tokens(x, self.layout.grid.size_for(x.shape[1] - prefix, prefix), prefix)
        out_BHWC = self.conv(self.layout.to_map(x).permute(0, 2, 3, 1))
        return self.layout.to_tokens(out_BHWC.permute(0, 3, 1, 2))
