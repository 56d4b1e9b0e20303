"""Locality for any vision transformer, in one call, and back."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from localvit.surgery.blocks import BlockSelection
from localvit.surgery.branch import (
    CHILD,
    LocalityBranch,
    attach,
    detach,
    has_branch,
    load_as_before,
    load_without_branches,
)
from localvit.surgery.paper_form import Locality, replace_feed_forwards
from localvit.surgery.sites import Grids, Site, find_sites, sites_of_blocks, sites_on_grid
from localvit.tokens.grid import stop_following
from localvit.tokens.mlp import LocalityMlp

Model = TypeVar("Model", bound=nn.Module)
FilterFn = Callable[[nn.Module, str], bool] | Collection[str]

BRANCH_OPTIONS = ("kernel_size", "dilation", "gate", "reduction", "norm")
"""What `localize` takes for the branch, with the meaning that `LocalityBranch` gives them."""
PAPER_OPTIONS = tuple(field.name for field in dataclasses.fields(Locality))
"""What `localize` takes for the paper's form, with the meaning that `Locality` gives them."""


@dataclass(frozen=True, kw_only=True)
class Localized:
    """What was done to a model; `localize` leaves it there as `model.localized`."""

    options: dict[str, Any]
    """Arguments of `localize` that do the same to the same model again, in values that JSON can hold."""
    frozen: tuple[str, ...]
    """Parameters that `trainable="locality"` has frozen."""


def localize(
    model: Model,
    blocks: BlockSelection = None,
    *,
    preserve: bool = True,
    filter_fn: FilterFn | None = None,
    grid: tuple[int, int] | str | None = None,
    num_prefix_tokens: int = 0,
    trainable: Literal["all", "locality"] = "all",
    **options: Any,
) -> Model:
    """Put locality into the feed-forwards of a vision transformer, in place; returns the model.

    By default the model computes what it did before, to the bit in eager mode: the hidden channels of each
    feed-forward get a depth-wise convolution beside them that starts at zero (see `LocalityBranch`). Parameters keep
    their names and values, so a state dict of the original loads before and after. With `preserve=False` the
    feed-forwards, their norms and their stochastic depth give way to the paper's module, freshly initialized (arXiv
    2104.05707, section 3.3), which is to be trained. In both, tokens that are no patches pass untouched.

    Known hosts are timm's vision transformers and those of Hugging Face transformers (see the table in
    docs/localize.md), also inside another module. Localize before `torch.compile` and before DistributedDataParallel.

    Args:
        model: the transformer. Its image size may change afterwards, as far as it allows that.
        blocks: which blocks, counted from 1 through all stages: None for all, "1-4", "1-4,9", or any list of numbers.
        preserve: keep the function; False for the paper's form.
        filter_fn: called with the last projection of each feed-forward, the module that reads the hidden channels, and
            its name; True puts locality there. Or a collection of such names.
        grid: for a module that is no known host: its patch grid (height, width), or the name of the submodule that
            returns the map of patches (B, C, H, W) in each forward. `filter_fn` then chooses among all linear layers,
            which have to read tokens (B, N, E).
        num_prefix_tokens: with `grid`, how many tokens come before the patches.
        trainable: "locality" freezes every other parameter.
        options: for the branch `kernel_size`, `dilation`, `gate`, `reduction`, `norm`, as in `LocalityBranch`; for the
            paper's form `act`, `reduction`, `expand_ratio` (the host's own by default), `depthwise`,
            `depthwise_first`, as in `Locality`.

    Raises:
        ValueError: when no feed-forward is found or chosen, the model is localized already, compiled or wrapped, or an
            option has no meaning. The model is then unchanged. Later, in forward, when tokens do not fill the grid.
        TypeError: for an option that the form does not have.
    """
    _check_model(model)
    known_options = BRANCH_OPTIONS if preserve else PAPER_OPTIONS
    if unknown := options.keys() - set(known_options):
        form = "the branch (preserve=True)" if preserve else "the paper's form (preserve=False)"
        raise TypeError(
            f"{form} has no option {', '.join(sorted(unknown))}; its options are {', '.join(known_options)}"
        )
    if trainable not in ("all", "locality"):
        raise ValueError(f"trainable={trainable!r}: choose 'all' or 'locality'")
    if blocks is not None and not isinstance(blocks, str):
        blocks = list(blocks)
    sites = _chosen(model, blocks, filter_fn, grid, num_prefix_tokens)
    if preserve:
        _add_branches(model, sites, options)
    else:
        replace_feed_forwards(sites, lambda site: Locality(**{"expand_ratio": site.expand_ratio} | options))
    frozen = _freeze_others(model) if trainable == "locality" else ()
    remembered: dict[str, Any] = dict(options)
    if not preserve:
        remembered["preserve"] = False
    if grid is not None:
        remembered |= {"grid": grid, "num_prefix_tokens": num_prefix_tokens}
    if filter_fn is not None:
        remembered["filter_fn"] = [site.projection_name for site in sites]
    elif blocks is not None:
        remembered["blocks"] = blocks
    if trainable != "all":
        remembered["trainable"] = trainable
    model.localized = Localized(options=remembered, frozen=frozen)  # type: ignore[assignment]
    if isinstance(made_from := getattr(model, "made_from", None), dict):
        made_from["args"]["localize"] = remembered
    return model


def delocalize(model: Model, *, discard: bool = False) -> Model:
    """Take the branches that `localize` put there away again, in place; returns the model.

    An untrained branch changes nothing, so the original comes back bit for bit.

    Args:
        discard: take trained branches away too, and with them what they have learned.

    Raises:
        ValueError: when there is no locality, when it is the paper's form, which has replaced the feed-forwards for
            good, or when a branch is trained and is not to be discarded. The model is then unchanged.
    """
    if any(isinstance(module, LocalityMlp) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} holds the paper's form, which has replaced the feed-forwards: their weights are "
            "gone, make the model anew"
        )
    hosts = {name: module for name, module in model.named_modules() if has_branch(module)}
    if not hosts:
        raise ValueError(f"{type(model).__name__} is not localized")
    trained = [name for name, module in hosts.items() if not module.get_submodule(CHILD).is_neutral]
    if trained and not discard:
        raise ValueError(
            f"{len(trained)} of {len(hosts)} branches are trained ({_some(trained)}): the model would compute "
            "something else without them; discard=True takes them away all the same"
        )
    for module in hosts.values():
        detach(module)
    stop_following(model)
    load_as_before(model)
    if isinstance(localized := getattr(model, "localized", None), Localized):
        parameters = dict(model.named_parameters())
        for name in localized.frozen:
            parameters[name].requires_grad_(True)
        del model.localized
    if isinstance(made_from := getattr(model, "made_from", None), dict):
        made_from["args"].pop("localize", None)
    return model


def locality_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that bring locality, branches or the paper's form, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LocalityBranch | LocalityMlp)}


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError("this model is compiled: localize it first, then compile it")
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ValueError(f"this model is wrapped in {kind}: localize model.module before you wrap it")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("this model is TorchScript, which cannot be changed: localize the module it came from")
    if there := locality_modules(model):
        raise ValueError(f"{kind} has locality already, in {len(there)} feed-forwards ({_some(list(there))})")


def _chosen(
    model: nn.Module,
    blocks: BlockSelection,
    filter_fn: FilterFn | None,
    grid: tuple[int, int] | str | None,
    num_prefix_tokens: int,
) -> list[Site]:
    kind = type(model).__name__
    if grid is None:
        sites = find_sites(model)
        if not sites:
            raise ValueError(
                f"{kind} has no feed-forward that is known here: none of its modules is a known host. Say which linear "
                "layers read the hidden channels with filter_fn, and on which patch grid they work with grid"
            )
    elif filter_fn is None:
        raise ValueError("grid is for a module that is no known host, so filter_fn has to say where locality goes")
    else:
        sites = sites_on_grid(model, grid, num_prefix_tokens)
    chosen = sites_of_blocks(sites, blocks) if blocks is not None else sites
    if not chosen:
        raise ValueError(f"blocks={blocks!r} names none of the blocks of {kind}")
    if filter_fn is not None:
        names = [site.projection_name for site in chosen]
        if not callable(filter_fn) and (missing := set(filter_fn) - set(names)):
            raise ValueError(f"filter_fn names {_some(sorted(missing))}, but {kind} has {_some(names)}")
        matches = filter_fn if callable(filter_fn) else lambda _, name: name in set(filter_fn)
        chosen = [site for site in chosen if matches(site.projection, site.projection_name)]
        if not chosen:
            raise ValueError(f"filter_fn matched none of the {len(names)} projections of {kind}: {_some(names)}")
    return chosen


def _add_branches(model: nn.Module, sites: list[Site], options: dict[str, Any]) -> None:
    grids = Grids()
    branches = [
        LocalityBranch(site.hidden_dim, site.layout(grids.of(site)), **options, **site.factory) for site in sites
    ]
    grids.follow()
    for site, branch in zip(sites, branches, strict=True):
        attach(site.projection, branch.train(site.projection.training))
    load_without_branches(model)


def _freeze_others(model: nn.Module) -> tuple[str, ...]:
    own = {id(parameter) for module in locality_modules(model).values() for parameter in module.parameters()}
    others = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    }
    for parameter in others.values():
        parameter.requires_grad_(False)
    return tuple(others)


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
