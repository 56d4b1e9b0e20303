"""The paper's form: the locality module in place of a transformer block's feed-forward.

What the paper does to a block (arXiv 2104.05707, section 3.3): the feed-forward becomes the locality module, the norm
before it goes, and neither stochastic depth nor layer scale act on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn

from localvit.surgery.sites import Grids, Site, Slot
from localvit.tokens.grid import Grid
from localvit.tokens.mlp import FusedMlp, LocalityMlp

# Their forward branches on shapes, which a graph tracer cannot follow: they stay whole in a traced graph.
register_notrace_module(Grid)
register_notrace_module(LocalityMlp)
register_notrace_module(FusedMlp)


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
    """False leaves the depth-wise convolution out: the control without neighbors."""
    depthwise_first: bool = False
    """True convolves before the expansion."""

    def feed_forward(self, dim: int, layout: nn.Module, *, device=None, dtype=None) -> LocalityMlp:
        """The module for a feed-forward slot of width `dim`, whose tokens lie as `layout` says."""
        return LocalityMlp(
            dim,
            layout,
            expand_ratio=self.expand_ratio,
            act=self.act,
            reduction=self.reduction,
            depthwise=self.depthwise,
            depthwise_first=self.depthwise_first,
            device=device,
            dtype=dtype,
        )


def replace_feed_forwards(sites: Sequence[Site], locality_of: Callable[[Site], Locality]) -> None:
    """Put the module that `locality_of` says, freshly initialized, into the slot of each site.

    Raises ValueError where a block has no such slot or the module cannot be made; nothing is changed then.
    """
    for site in sites:
        if not isinstance(site.slot, Slot):
            raise ValueError(f"the paper's form cannot replace {site.name}: {site.slot}")
    grids = Grids()
    modules = [locality_of(site).feed_forward(site.dim, site.layout(grids.of(site)), **site.factory) for site in sites]
    grids.follow()
    for site, mlp in zip(sites, modules, strict=True):
        mlp.apply(init_weights_vit_timm).train(site.block.training)
        _replace(site.block, mlp, site.slot)  # type: ignore[arg-type]


def _replace(block: nn.Module, mlp: LocalityMlp, slot: Slot) -> None:
    """Put `mlp` in the slot; take away the old one's norm, stochastic depth and layer scale."""
    setattr(block, slot.mlp, mlp)
    for name in filter(None, (slot.norm, slot.drop_path)):
        setattr(block, name, nn.Identity())
    scale: Any = getattr(block, slot.scale) if slot.scale else None
    if isinstance(scale, nn.Parameter):  # The host multiplies by it, so it stays, as ones that do not learn.
        with torch.no_grad():
            scale.fill_(1.0).requires_grad_(False)
    elif slot.scale:
        setattr(block, slot.scale, nn.Identity())
