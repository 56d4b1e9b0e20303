"""The paper's module in place of a transformer block's feed-forward.

What the paper does to a block (arXiv 2104.05707, section 3.3): the feed-forward becomes the locality module, the norm
before it goes, and neither stochastic depth nor layer scale acts on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from localvit.locality import resolve_act
from localvit.surgery.sites import Grids, Site, Slot, Unsupported
from localvit.tokens.grid import Grid
from localvit.tokens.layouts import Layout
from localvit.tokens.mlp import FusedMlp, LocalityMlp

# Their forward branches on shapes, which a graph tracer cannot follow: they stay whole in a traced graph.
register_notrace_module(Grid)
register_notrace_module(LocalityMlp)
register_notrace_module(FusedMlp)


@dataclass(frozen=True, kw_only=True)
class Replace:
    """A method for `localize`: replace the feed-forward by the paper's module (`LocalityFeedForward`).

    Raises:
        ValueError: for an unknown activation, a reduction or ratio that is not positive, or `depthwise_first` without
            the depth-wise convolution.
    """

    act: str | int = "hs+se"
    """Activation and channel gate, by name or published integer (see `localvit.locality.ACTS`)."""
    reduction: int = 4
    """Divisor of the hidden width for the bottleneck of the squeeze-and-excitation gate."""
    expand_ratio: float | None = None
    """Hidden width over the block's width; None for that of the feed-forward that is replaced."""
    depthwise: bool = True
    """False leaves the depth-wise convolution out: the control without neighbors."""
    depthwise_first: bool = False
    """True puts the depth-wise convolution before the expansion."""

    def __post_init__(self) -> None:
        resolve_act(self.act)
        if self.reduction < 1:
            raise ValueError(f"reduction={self.reduction} must be at least 1")
        if self.expand_ratio is not None and self.expand_ratio <= 0:
            raise ValueError(f"expand_ratio={self.expand_ratio} must be positive")
        if self.depthwise_first and not self.depthwise:
            raise ValueError("depthwise_first=True needs the depth-wise convolution, which depthwise=False leaves out")

    def feed_forward(
        self,
        dim: int,
        layout: Layout,
        expand_ratio: float = 4.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LocalityMlp:
        """The module for a feed-forward of width `dim`; `expand_ratio` counts where this has none of its own."""
        return LocalityMlp(
            dim,
            layout,
            expand_ratio=expand_ratio if self.expand_ratio is None else self.expand_ratio,
            act=self.act,
            reduction=self.reduction,
            depthwise=self.depthwise,
            depthwise_first=self.depthwise_first,
            device=device,
            dtype=dtype,
        )


def replace_feed_forwards(sites: Sequence[Site], method_of: Callable[[Site], Replace]) -> None:
    """Replace the feed-forward of each site, in place, by a new module as `method_of(site)` describes it.

    Raises ValueError where a block does not support it or the module cannot be made; nothing is changed then.
    """
    for site in sites:
        if isinstance(site.slot, Unsupported):
            raise ValueError(f"the paper's module cannot replace {site.name}: {site.slot.reason}")
    first: dict[nn.Module, Site] = {}
    for site in sites:
        if (same := first.setdefault(site.projection, site)) is not site:
            raise ValueError(
                f"the paper's module cannot replace {site.name}, which is the same module as {same.name} in another "
                "block: give each block a feed-forward of its own"
            )
    grids = Grids()
    modules = [
        method_of(site).feed_forward(site.dim, site.layout(grids.of(site)), site.expand_ratio, **site.factory)
        for site in sites
    ]
    grids.connect()
    for site, mlp in zip(sites, modules, strict=True):
        assert isinstance(site.slot, Slot)
        mlp.apply(init_weights_vit_timm).train(site.block.training)
        _replace(site.block, mlp, site.slot)


def _replace(block: nn.Module, mlp: LocalityMlp, slot: Slot) -> None:
    """Put `mlp` into the slot, and remove the norm, stochastic depth and layer scale of the old feed-forward."""
    setattr(block, slot.mlp, mlp)
    for name in filter(None, (slot.norm, slot.drop_path)):
        setattr(block, name, nn.Identity())
    scale: Any = getattr(block, slot.scale) if slot.scale else None
    if isinstance(scale, nn.Parameter):  # The host multiplies by it, so it stays, as frozen ones.
        with torch.no_grad():
            scale.fill_(1.0).requires_grad_(False)
    elif slot.scale:
        setattr(block, slot.scale, nn.Identity())
