"""Surgery: the locality module in place of a transformer block's feed-forward.

What the paper does to a block (arXiv 2104.05707, section 3.3): the feed-forward becomes the locality module, the norm
before it goes, and stochastic depth no longer acts on it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from timm.layers import register_notrace_module
from torch import nn

from localvit.tokens import Grid, LocalityMlp

# Their forward branches on shapes, which a graph tracer cannot follow: both stay whole in a traced graph.
register_notrace_module(Grid)
register_notrace_module(LocalityMlp)

BlockSelection = str | Iterable[int] | None


def select_blocks(local_blocks: BlockSelection, depth: int) -> frozenset[int]:
    """Indices from 0 of the blocks that get locality, out of `depth`.

    `local_blocks` counts from 1 as the paper's Table 5 does: None for all, "1-4", "1-4,9,12", "" or [] for none, or
    any list of numbers. Raises ValueError for what is no such list or no such block.
    """
    if local_blocks is None:
        return frozenset(range(depth))
    if isinstance(local_blocks, str):
        numbers: set[int] = set()
        for part in filter(None, re.split(r"[,\s]+", local_blocks.strip())):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            if not match:
                raise ValueError(
                    f"local_blocks={local_blocks!r}: {part!r} is neither a block like 3 nor a range like 1-4"
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ValueError(f"local_blocks={local_blocks!r}: the range {part} runs backwards")
            numbers.update(range(first, last + 1))
    else:
        numbers = set(local_blocks)
    outside = sorted(number for number in numbers if not 1 <= number <= depth)
    if outside:
        raise ValueError(f"local_blocks={local_blocks!r}: the model has blocks 1 to {depth}, not {outside}")
    return frozenset(number - 1 for number in numbers)


@dataclass(frozen=True, kw_only=True)
class Locality:
    """What the paper varies about the module, as one value that every family passes on."""

    act: str | int = "hs+se"
    """Activation and gate, by name or published integer."""
    reduction: int = 4
    """Divisor of the hidden width for the squeeze-and-excitation bottleneck."""
    expand_ratio: float = 4.0
    """Hidden width over the block's width."""
    depthwise: bool = True
    """False leaves the depth-wise convolution out: the control without neighbours."""
    depthwise_first: bool = False
    """True convolves before the expansion."""

    def feed_forward(self, dim: int, grid: Grid, num_prefix_tokens: int = 0, *, device=None, dtype=None) -> LocalityMlp:
        """The module for a feed-forward slot of width `dim`."""
        return LocalityMlp(
            dim,
            grid,
            num_prefix_tokens,
            expand_ratio=self.expand_ratio,
            act=self.act,
            reduction=self.reduction,
            depthwise=self.depthwise,
            depthwise_first=self.depthwise_first,
            device=device,
            dtype=dtype,
        )


def replace_feed_forward(block: nn.Module, mlp: LocalityMlp, *, norm: str, drop_path: str) -> None:
    """Put `mlp` in the block's feed-forward slot; take away the old one's norm and stochastic depth, by their names."""
    block.mlp = mlp
    setattr(block, norm, nn.Identity())
    setattr(block, drop_path, nn.Identity())
