"""`localize` puts locality into any vision transformer, and `delocalize` removes it."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from localvit.surgery.adapter import (
    CHILD,
    Adapter,
    LocalityAdapter,
    accept_state_dicts_without_adapters,
    attach,
    check_attachable,
    detach,
    has_adapter,
    refuse_state_dicts_without_adapters,
)
from localvit.surgery.blocks import BlockSelection
from localvit.surgery.options import Method, options_of, parse_options
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.sites import Grids, Site, find_sites, sites_of_blocks, sites_on_grid
from localvit.tokens.mlp import LocalityMlp
from localvit.tokens.sources import disconnect

Model = TypeVar("Model", bound=nn.Module)
FilterFn = Callable[[nn.Module, str], bool] | Collection[str]
Trainable = Literal["all", "locality"]


@dataclass(frozen=True, kw_only=True)
class Localized:
    """What `localize` did to a model; it is stored as `model.localized`."""

    options: dict[str, Any]
    """Plain values for `localize_with_options`, which do the same to the same model again; JSON can store them."""
    frozen: tuple[str, ...]
    """Names of the parameters that `trainable="locality"` has frozen."""


def localize(
    model: Model,
    method: Method = Adapter(),  # noqa: B008, it is frozen
    *,
    blocks: BlockSelection = None,
    filter_fn: FilterFn | None = None,
    grid: tuple[int, int] | str | None = None,
    num_prefix_tokens: int = 0,
    trainable: Trainable = "all",
    inplace: bool = False,
) -> Model:
    """Add locality to the feed-forwards of a vision transformer.

    With `Adapter()`, the default, the model computes what it did before, bit-exactly in eager mode: a depth-wise
    convolution that starts at zero is added to the hidden channels of each feed-forward. Parameters keep their names
    and values, so a state dict of the original still loads. With `Replace()` the paper's module (arXiv 2104.05707,
    section 3.3), newly initialized, replaces the feed-forwards with their norms and their stochastic depth, and has to
    be trained. With both, tokens that are not patches pass unchanged.

    Supported hosts are vision transformers of timm and of Hugging Face transformers (the table in docs/localize.md),
    also inside another module. Localize before `torch.compile`, before DistributedDataParallel and before you create
    an optimizer.

    Args:
        model: the transformer. Its image size may change afterwards, as far as it allows that.
        method: `Adapter` or `Replace`, with their options.
        blocks: which blocks, counted from 1 through all stages: None for all, "1-4", "1-4,9", or a list of numbers.
        filter_fn: called with the last projection of each feed-forward (the module that reads the hidden channels) and
            its name; returns whether the feed-forward gets locality. Or a collection of such names.
        grid: for a module that is not a supported host: its patch grid (height, width), or the name of the submodule
            that returns the map of patches (B, C, H, W) in each forward. `filter_fn` then selects among all linear
            layers; those it selects must read tokens (B, N, E).
        num_prefix_tokens: with `grid`, the number of tokens before the patches.
        trainable: "locality" freezes all other parameters.
        inplace: change `model` itself, which saves the memory of a second model. By default `model` stays as it is,
            and a changed deep copy is returned.

    Returns:
        The localized model. `localized.options` of it describes what was done.

    Raises:
        ValueError: when no feed-forward is found or selected, the model has locality already, is compiled or wrapped,
            or an option is invalid. The model is then unchanged. In its forward, when tokens do not fill the grid.
    """
    _check_model(model)
    if trainable not in ("all", "locality"):
        raise ValueError(f"trainable={trainable!r}: choose 'all' or 'locality'")
    if blocks is not None and not isinstance(blocks, str):
        blocks = list(blocks)
    sites = _select(model, blocks, filter_fn, grid, num_prefix_tokens)
    names = [site.projection_name for site in sites]
    if not inplace:
        model = copy.deepcopy(model)
        sites = _select(model, None, names, grid, num_prefix_tokens)
    if isinstance(method, Replace):
        replace_feed_forwards(sites, lambda site: method)
    else:
        _add_adapters(model, sites, method)
    frozen = _freeze_others(model) if trainable == "locality" else ()
    options = options_of(method)
    if grid is not None:
        options |= {"grid": grid, "num_prefix_tokens": num_prefix_tokens}
    if filter_fn is not None:
        options["filter_fn"] = names
    elif blocks is not None:
        options["blocks"] = blocks
    if trainable != "all":
        options["trainable"] = trainable
    model.localized = Localized(options=options, frozen=frozen)  # type: ignore[assignment]
    if isinstance(made_from := getattr(model, "made_from", None), dict):
        made_from["args"]["localize"] = options
    return model


def localize_with_options(model: Model, options: Mapping[str, Any], *, inplace: bool = False) -> Model:
    """Call `localize` with plain values (`localvit.surgery.options`), such as `model.localized.options` of another one.

    Raises as `localize` and `parse_options` do.
    """
    method, others = parse_options(options)
    return localize(model, method, **others, inplace=inplace)


def delocalize(model: Model, *, discard: bool = False, inplace: bool = False) -> Model:
    """Remove the adapters that `localize` added.

    Untrained adapters do nothing, so the original comes back bit-exactly.

    Args:
        model: a model with adapters.
        discard: remove trained adapters too; what they learned is lost.
        inplace: change `model` itself; by default a changed deep copy is returned.

    Returns:
        The model without locality.

    Raises:
        ValueError: when the model has no locality, when it has the paper's module, which has replaced the
            feed-forwards for good, or when an adapter is trained and `discard` is False. The model is then unchanged.
    """
    kind = type(model).__name__
    if any(isinstance(module, LocalityMlp) for module in model.modules()):
        raise ValueError(
            f"{kind} has the paper's module in place of its feed-forwards, whose weights are gone: create the model "
            "again instead"
        )
    projections = {name: module for name, module in model.named_modules() if has_adapter(module)}
    if not projections:
        raise ValueError(f"{kind} is not localized")
    trained = [name for name, module in projections.items() if not module.get_submodule(CHILD).is_neutral]
    if trained and not discard:
        raise ValueError(
            f"{len(trained)} of {len(projections)} adapters are trained ({_some(trained)}), so the model computes "
            "something else without them: pass discard=True to remove them anyway"
        )
    if not inplace:
        model = copy.deepcopy(model)
    for module in [module for module in model.modules() if has_adapter(module)]:
        detach(module)
    disconnect(model)
    refuse_state_dicts_without_adapters(model)
    if isinstance(localized := getattr(model, "localized", None), Localized):
        parameters = dict(model.named_parameters())
        for name in localized.frozen:
            parameters[name].requires_grad_(True)
        del model.localized
    if isinstance(made_from := getattr(model, "made_from", None), dict):
        made_from["args"].pop("localize", None)
    return model


def locality_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that contain locality, adapters or the paper's module, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LocalityAdapter | LocalityMlp)}


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError("this model is compiled: localize it first, then compile it")
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ValueError(f"this model is wrapped in {kind}: localize model.module before you wrap it")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("this model is TorchScript, which cannot be changed: localize the module it came from")
    if found := locality_modules(model):
        raise ValueError(f"{kind} has locality already, in {len(found)} feed-forwards ({_some(list(found))})")


def _select(
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
                f"{kind} has no feed-forward that localize can find: neither it nor one of its modules is a supported "
                "host. Select the linear layers that read the hidden channels with filter_fn, and give their patch "
                "grid with grid"
            )
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
            raise ValueError(f"filter_fn names {_some(sorted(missing))}, but {kind} has {_some(names)}")
        matches = filter_fn if callable(filter_fn) else lambda _, name: name in set(filter_fn)
        selected = [site for site in selected if matches(site.projection, site.projection_name)]
        if not selected:
            raise ValueError(f"filter_fn matched none of the {len(names)} projections of {kind}: {_some(names)}")
    return selected


def _add_adapters(model: nn.Module, sites: list[Site], method: Adapter) -> None:
    for site in sites:
        check_attachable(site.projection, site.projection_name)
    grids = Grids()
    adapters = [LocalityAdapter(site.hidden_dim, site.layout(grids.of(site)), method, **site.factory) for site in sites]
    for site, adapter in zip(sites, adapters, strict=True):
        attach(site.projection, adapter.train(site.projection.training))
    grids.connect()
    accept_state_dicts_without_adapters(model)


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
