"""Where a model's feed-forwards are, and how the tokens in them lie on the patch grid.

A host is a class of another library that has a rule here. The rule yields a `Site` for each feed-forward. Rules are
found by the full name of the class, so that no library has to be imported. See `host` for what a rule must provide.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from localvit.surgery.blocks import BlockSelection, select_blocks
from localvit.tokens.grid import Grid
from localvit.tokens.layouts import Layout, TokenSequence
from localvit.tokens.sources import FixedGrid, GridSource, OutputMap, enclose_calls, recognize_inputs

PROJECTIONS = ("fc2", "w2", "down_proj", "ln2", "weights_out", "dense", "dense2")
"""Names that hosts give to a feed-forward's last projection, the one that reads the hidden channels."""

LayoutFactory = Callable[..., Layout]
"""Makes a layout from a grid, or from None where the layout needs no grid."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The parts of a block that the paper's module replaces, by their attribute names in the block."""

    mlp: str = "mlp"
    norm: str | None = "norm2"
    """None where the feed-forward contains its norm, or has none."""
    drop_path: str | None = "drop_path2"
    """None where no stochastic depth acts on the feed-forward only."""
    scale: str | None = None
    """Layer scale, a module or a parameter."""


@dataclass(frozen=True)
class Unsupported:
    """The paper's module cannot replace a feed-forward."""

    reason: str
    """Completes "the paper's module cannot replace <name>: ...", and says what to do, if something can be done."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One feed-forward of a host. Names are those in the model."""

    name: str
    """Name of the feed-forward."""
    host: nn.Module
    """The module whose rule found the feed-forward. Each call of it is one forward pass."""
    block_name: str
    """Name of the block that contains the feed-forward."""
    block: nn.Module
    projection_name: str
    """Name of the feed-forward's last projection."""
    projection: nn.Module
    """That projection, whose input are the hidden tokens."""
    source: GridSource | None
    """Where the grid is known; None for layouts that need no grid, since their tokens have a height and a width."""
    layout: LayoutFactory
    """Makes the layout of the tokens, given the grid of `source`."""
    slot: Slot | Unsupported
    """What the paper's module replaces, or why it cannot."""

    @property
    def hidden_dim(self) -> int:
        """Number of hidden channels."""
        return _widths(self.projection)[0]

    @property
    def dim(self) -> int:
        """Number of channels of the block."""
        return _widths(self.projection)[1]

    @property
    def expand_ratio(self) -> float:
        """Hidden channels over the block's channels, so that `int(dim * expand_ratio)` is `hidden_dim` again."""
        ratio = self.hidden_dim / self.dim
        return ratio if int(self.dim * ratio) == self.hidden_dim else math.nextafter(ratio, math.inf)

    @property
    def factory(self) -> dict[str, Any]:
        """Device and dtype for new modules. Raises ValueError where the host's weights are not floating point."""
        weight = next(self.projection.parameters(), None)
        if weight is None or not weight.is_floating_point():
            held = "no parameters" if weight is None else f"weights of {weight.dtype}"
            raise ValueError(f"{self.projection_name} has {held}: localize the model before it is quantized")
        return {"device": weight.device, "dtype": weight.dtype}


def _widths(projection: nn.Module) -> tuple[int, int]:
    for module in projection.modules():
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels, module.out_channels
    raise ValueError(
        f"{type(projection).__name__} is not a supported projection: it has no linear layer or convolution"
    )


def site(
    host: nn.Module,
    block_name: str,
    source: GridSource | None,
    layout: LayoutFactory = TokenSequence,
    *,
    mlp: str = "mlp",
    slot: Slot | Unsupported | None = None,
) -> Site:
    """The site of one feed-forward, for use in rules.

    Args:
        host: the module that the rule was called with.
        block_name: name of the block in the host; "" where the block is the host.
        source: where the host knows the patch grid; None for layouts that need no grid.
        layout: makes the layout of the tokens from a grid.
        mlp: name of the feed-forward in the block.
        slot: what the paper's module replaces; None to derive it from the names that timm uses (`timm_slot`).

    Raises:
        ValueError: when the feed-forward's last projection has none of the names in `PROJECTIONS`.
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
                "select its projection with filter_fn and grid"
            )
        projection_name, projection = f"{name}.{last}", feed_forward.get_submodule(last)
    return Site(
        name=name,
        host=host,
        block_name=block_name,
        block=block,
        projection_name=projection_name,
        projection=projection,
        source=source,
        layout=layout,
        slot=timm_slot(block, mlp) if slot is None else slot,
    )


def timm_slot(block: nn.Module, mlp: str = "mlp") -> Slot | Unsupported:
    """The slot of a block that names its parts as most of timm's blocks do."""
    kind = type(block).__name__
    if not hasattr(block, "norm2"):
        return Unsupported(f"{kind} has no norm that serves the feed-forward only")
    scale = next((name for name in ("ls2", "gamma_2", "gamma2") if getattr(block, name, None) is not None), None)
    if hasattr(block, "drop_path2"):
        return Slot(mlp=mlp, scale=scale)
    if isinstance(getattr(block, "drop_path", None), nn.Identity | None):
        return Slot(mlp=mlp, drop_path=None, scale=scale)
    return Unsupported(
        f"the stochastic depth of {kind} serves its attention too: create the model without drop_path_rate"
    )


Rule = Callable[[Any], Iterator[Site]]
_RULES: dict[str, Rule] = {}


def host(*class_names: str) -> Callable[[Rule], Rule]:
    """Register a rule for classes, given as "module.Class". It holds for their subclasses too.

    The rule is a generator function. It is called with an instance of the class and yields a `Site`, made by `site`,
    for every feed-forward that works on patches, in the order of the forward pass. It must

    - skip feed-forwards that see the class token only (class attention, attention pooling): they have no neighbors;
    - give the `GridSource` that knows the patch grid in each forward pass: `OutputMap` or `InputMap` where a module
      returns or reads a map, `ArgumentsGrid` or `ResultGrid` where its arguments or its result tell the grid,
      `FixedGrid` where the host takes one image size. Never derive a grid from a number of tokens;
    - give the layout: which tokens are prefix tokens, and the order of the others;
    - give the `Slot` of the parts that the paper's module replaces, or `Unsupported` with the reason, where a norm, a
      stochastic depth or a layer scale serves more than the feed-forward;
    - raise ValueError, with what to do about it, for a configuration that leaves no map, such as dropped patches.

    It must not change the model. Functions given to a source must be picklable: functions of a file, or partials.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(class_names, rule))
        return rule

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module's class, or for its nearest base class that has one."""
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
    """All linear layers of a module that is not a known host, each as if it were a feed-forward's last projection.

    Raises ValueError for a grid that is not one, or does not name a submodule.
    """
    if isinstance(grid, str):
        if grid not in dict(model.named_modules()):
            raise ValueError(f"grid={grid!r} is not the name of a submodule of {type(model).__name__}")
        source: GridSource = OutputMap(model.get_submodule(grid))
    elif len(grid) == 2 and min(grid) >= 1:
        source = FixedGrid((grid[0], grid[1]))
    else:
        raise ValueError(f"grid={grid!r} must be (height, width) in patches, or the name of a submodule")
    reason = "this works for supported hosts only; use localvit.LocalityFeedForward in the code of the module instead"
    return [
        Site(
            name=name,
            host=model,
            block_name=name.rpartition(".")[0],
            block=model.get_submodule(name.rpartition(".")[0]),
            projection_name=name,
            projection=module,
            source=source,
            layout=partial(TokenSequence, num_prefix_tokens=num_prefix_tokens),
            slot=Unsupported(reason),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def sites_of_blocks(sites: list[Site], blocks: BlockSelection, *, argument: str = "blocks") -> list[Site]:
    """The sites in the selected blocks, which count from 1 in the order of the model."""
    names = list(dict.fromkeys(site.block_name for site in sites))
    selected = {names[index] for index in select_blocks(blocks, len(names), argument=argument)}
    return [site for site in sites if site.block_name in selected]


def local_sites(model: nn.Module, local_blocks: BlockSelection) -> list[Site]:
    """The sites in the blocks that the argument `local_blocks` of this package's models selects."""
    return sites_of_blocks(find_sites(model), local_blocks, argument="local_blocks")


class Grids:
    """The `Grid` of each source that several sites share. Connect them last, when nothing can fail any more."""

    def __init__(self) -> None:
        self._grids: dict[GridSource, Grid] = {}
        self._sites: list[Site] = []

    def of(self, site: Site) -> Grid | None:
        """The grid for the layout of a site; None where it needs none."""
        if site.source is None:
            return None
        self._sites.append(site)
        return self._grids.setdefault(site.source, site.source.new_grid())

    def connect(self) -> None:
        """Connect every grid with its source, and each call of the host with a grid of its own."""
        for source, grid in self._grids.items():
            source.connect(grid)
            sites = [site for site in self._sites if site.source is source]
            if source.module is None:
                continue
            inside = set(source.module.modules())
            if all(site.projection in inside for site in sites):  # Its call records the grid and uses it.
                enclose_calls(source.module, grid)
                continue
            for host in {id(site.host): site.host for site in sites}.values():
                enclose_calls(host, grid)
            for block in {id(site.block): site.block for site in sites}.values():
                recognize_inputs(block, grid)
