"""Which feed-forwards of a model `localize` changes, and why none could be found."""

from collections.abc import Callable, Collection

from torch import nn

from localvit.surgery.blocks import BlockSelection
from localvit.surgery.sites import PROJECTIONS, Site, find_sites, sites_of_blocks, sites_on_grid

FilterFn = Callable[[nn.Module, str], bool] | Collection[str]


def select_sites(
    model: nn.Module,
    blocks: BlockSelection,
    filter_fn: FilterFn | None,
    grid: tuple[int, int] | str | None,
    num_prefix_tokens: int,
) -> list[Site]:
    """The sites that the arguments of `localize` select, in the order of the model; each block once.

    Raises:
        ValueError: when nothing is found or selected.
    """
    kind = type(model).__name__
    if grid is None:
        sites = find_sites(model)
        if not sites:
            raise ValueError(_unknown_host(model))
    elif filter_fn is None:
        raise ValueError("grid is for a module that is not a supported host: select its linear layers with filter_fn")
    else:
        sites = sites_on_grid(model, grid, num_prefix_tokens)
    selected = sites_of_blocks(sites, blocks) if blocks is not None else sites
    if not selected:
        raise ValueError(f"blocks={blocks!r} selects none of the blocks of {kind}")
    if filter_fn is not None:
        names = [site.projection_name for site in selected]
        if not callable(filter_fn) and (missing := set(filter_fn) - set(names)):
            raise ValueError(f"filter_fn names {some(sorted(missing))}, but {kind} has {some(names)}")
        matches = filter_fn if callable(filter_fn) else lambda _, name: name in set(filter_fn)
        selected = [site for site in selected if matches(site.projection, site.projection_name)]
        if not selected:
            raise ValueError(f"filter_fn matched none of the {len(names)} projections of {kind}: {some(names)}")
    return _each_block_once(selected)


def some(names: list[str], count: int = 4) -> str:
    """The first names as text."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _each_block_once(sites: list[Site]) -> list[Site]:
    """The sites without those of a block that the model contains twice, so that both share their locality."""
    return list({(site.block, site.projection): site for site in reversed(sites)}.values())[::-1]


def _unknown_host(model: nn.Module) -> str:
    """What to do about a model in which no feed-forward was found."""
    kind = type(model).__name__
    unknown = (
        f"{kind} has no feed-forward that localize can find: neither it nor one of its modules is a supported host"
    )
    if not any("attention" in type(module).__name__.lower() for module in model.modules()):
        return (
            f"{unknown}, and it has no attention, so it is not a vision transformer. In other networks, use "
            "localvit.LocalityFeedForward in the code of the model"
        )
    named = dict(model.named_modules())
    projections = [
        name
        for name, module in named.items()
        if isinstance(module, nn.Linear)
        and module.in_features > module.out_features
        and (name.rpartition(".")[2] in (*PROJECTIONS, "linear2") or module.in_features >= 2 * module.out_features)
    ]
    maps = [
        name
        for name, module in named.items()
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1)
    ]
    hints = [
        f"It has attention. Select the linear layers that read the hidden channels with filter_fn"
        f"{f' (such as {some(projections, 2)})' if projections else ''}",
        f"and give their patch grid with grid: (height, width), or the name of the module that returns the map of "
        f"patches{f' (such as {some(maps, 1)})' if maps else ''}",
    ]
    return f"{unknown}. {', '.join(hints)}"
