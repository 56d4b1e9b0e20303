"""Where a model's feed-forwards are, and how the tokens in them lie on the patch grid.

Each host, a class of somebody's library, has a rule that names its sites. Rules are found by the full name of the
class, so that no library is imported for the sake of one rule.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from localvit.surgery.blocks import BlockSelection, select_blocks
from localvit.tokens.grid import Grid, GridSource, patch_map, static_grid
from localvit.tokens.layouts import TokenSequence

PROJECTIONS = ("fc2", "w2", "down_proj", "ln2", "weights_out", "dense")
"""Names by which hosts call a feed-forward's last projection, the one that reads the hidden channels."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The parts of a block that the paper's form replaces, by their names in the block."""

    mlp: str = "mlp"
    norm: str | None = "norm2"
    """None where the feed-forward holds its norm itself, or has none."""
    drop_path: str | None = "drop_path2"
    """None where the block has no stochastic depth of its own for the feed-forward."""
    scale: str | None = None
    """Layer scale, a module or a parameter."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One feed-forward."""

    name: str
    """Of the feed-forward, in the model."""
    block_name: str
    """Of the block that holds it, in the model."""
    block: nn.Module
    projection_name: str
    projection: nn.Module
    """The feed-forward's last projection, whose input is the hidden map."""
    source: GridSource | None
    """None for layouts that need no grid, for the tokens themselves have a height and a width."""
    layout: Callable[..., nn.Module]
    """Makes the layout of the tokens, given the grid of `source`."""
    slot: Slot | str
    """What the paper's form replaces, or why it cannot."""

    @property
    def hidden_dim(self) -> int:
        """Channels of the hidden map."""
        return _widths(self.projection)[0]

    @property
    def dim(self) -> int:
        """Channels of the block."""
        return _widths(self.projection)[1]

    @property
    def expand_ratio(self) -> float:
        """Hidden channels over the block's."""
        ratio = self.hidden_dim / self.dim
        return ratio if int(self.dim * ratio) == self.hidden_dim else math.nextafter(ratio, math.inf)

    @property
    def factory(self) -> dict[str, Any]:
        """Device and dtype for new modules. Raises ValueError where the host's weights are no floating point."""
        weight = next(self.projection.parameters())
        if not weight.is_floating_point():
            raise ValueError(f"{self.projection_name} holds {weight.dtype}: localize a model before it is quantized")
        return {"device": weight.device, "dtype": weight.dtype}


def _widths(projection: nn.Module) -> tuple[int, int]:
    for module in projection.modules():
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels, module.out_channels
    raise ValueError(f"{type(projection).__name__} is no projection that is known here: neither linear nor convolution")


def site(
    host: nn.Module,
    block_name: str,
    source: GridSource | None,
    layout: Callable[..., nn.Module] = TokenSequence,
    *,
    mlp: str = "mlp",
    slot: Slot | str | None = None,
) -> Site:
    """The site of the feed-forward `mlp` in a host's block; by default its slot is named as timm names it.

    Raises ValueError when the feed-forward has no projection by a known name.
    """
    block = host.get_submodule(block_name)
    feed_forward = block.get_submodule(mlp)
    name = f"{block_name}.{mlp}" if block_name else mlp
    if isinstance(feed_forward, nn.Linear):
        projection_name, projection = name, block.get_submodule(mlp)
    else:
        last = next((last for last in PROJECTIONS if hasattr(feed_forward, last)), None)
        if last is None:
            raise ValueError(
                f"{name} ({type(feed_forward).__name__}) has no last projection called {', '.join(PROJECTIONS)}: "
                "name it with filter_fn and grid"
            )
        projection_name, projection = f"{name}.{last}", feed_forward.get_submodule(last)
    return Site(
        name=name,
        block_name=block_name,
        block=block,
        projection_name=projection_name,
        projection=projection,
        source=source,
        layout=layout,
        slot=timm_slot(block, mlp) if slot is None else slot,
    )


def timm_slot(block: nn.Module, mlp: str = "mlp") -> Slot | str:
    """The slot of a block that names its parts as most of timm's do, or why it has none."""
    if not hasattr(block, "norm2"):
        return f"{type(block).__name__} has no norm that serves the feed-forward alone"
    scale = next((name for name in ("ls2", "gamma_2", "gamma2") if getattr(block, name, None) is not None), None)
    if hasattr(block, "drop_path2"):
        return Slot(mlp=mlp, scale=scale)
    if isinstance(getattr(block, "drop_path", None), nn.Identity | None):
        return Slot(mlp=mlp, drop_path=None, scale=scale)
    return (
        f"the one stochastic depth of {type(block).__name__} serves its attention too: make the model without "
        "drop_path_rate"
    )


Rule = Callable[[Any], Iterator[Site]]
_RULES: dict[str, Rule] = {}


def host(*class_names: str) -> Callable[[Rule], Rule]:
    """Register a rule for classes, by `module.Class`; it holds for their subclasses too."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(class_names, rule))
        return rule

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module's class or the nearest class that it derives from."""
    for cls in type(module).__mro__:
        if rule := _RULES.get(f"{cls.__module__}.{cls.__qualname__}"):
            return rule
    return None


def find_sites(model: nn.Module, prefix: str = "") -> list[Site]:
    """The sites of every host inside `model`, in the order of its modules."""
    rule = rule_of(model)
    if rule is None:
        return [found for name, child in model.named_children() for found in find_sites(child, f"{prefix}{name}.")]
    return [
        dataclasses.replace(
            found,
            name=prefix + found.name,
            block_name=(prefix + found.block_name).rstrip("."),
            projection_name=prefix + found.projection_name,
        )
        for found in rule(model)
    ]


def sites_on_grid(model: nn.Module, grid: tuple[int, int] | str, num_prefix_tokens: int) -> list[Site]:
    """All linear layers of a module that is no known host, as if each were a feed-forward's last projection.

    Raises ValueError for a grid that is none, or names no submodule.
    """
    if isinstance(grid, str):
        if grid not in dict(model.named_modules()):
            raise ValueError(f"grid={grid!r} names no submodule of {type(model).__name__}")
        source = patch_map(model.get_submodule(grid))
    elif len(grid) == 2 and min(grid) >= 1:
        source = static_grid((grid[0], grid[1]))
    else:
        raise ValueError(f"grid={grid!r} must be (height, width) in patches, or the name of a submodule")
    why = "only a known host's feed-forward can give way to it; put localvit.LocalityFeedForward there by hand"
    return [
        Site(
            name=name,
            block_name=name.rpartition(".")[0],
            block=module,
            projection_name=name,
            projection=module,
            source=source,
            layout=partial(TokenSequence, num_prefix_tokens=num_prefix_tokens),
            slot=why,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def sites_of_blocks(sites: list[Site], blocks: BlockSelection, *, argument: str = "blocks") -> list[Site]:
    """The sites in the selected blocks, which are numbered from 1 in the order of the model."""
    names = list(dict.fromkeys(site.block_name for site in sites))
    selected = {names[index] for index in select_blocks(blocks, len(names), argument=argument)}
    return [site for site in sites if site.block_name in selected]


def local_sites(model: nn.Module, local_blocks: BlockSelection) -> list[Site]:
    """The sites of a new model of ours in the blocks that its argument `local_blocks` names."""
    return sites_of_blocks(find_sites(model), local_blocks, argument="local_blocks")


class Grids:
    """The `Grid` of each source that a surgery meets. They are hung up at last, once nothing can fail any more."""

    def __init__(self) -> None:
        self._grids: dict[GridSource, Grid] = {}

    def of(self, site: Site) -> Grid | None:
        """The grid for the layout of a site; None where that needs none."""
        if site.source is None:
            return None
        return self._grids.setdefault(site.source, site.source.grid())

    def follow(self) -> None:
        """Hang every grid on its source."""
        for source, grid in self._grids.items():
            source.hang(grid)
