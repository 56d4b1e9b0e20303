"""`localize` puts locality into any vision transformer, and `delocalize` removes it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from localvit.surgery.adapter import Adapter, LocalityAdapter
from localvit.surgery.blocks import BlockSelection
from localvit.surgery.model_config import record_in_config, remove_from_config
from localvit.surgery.options import Method, options_of, parse_options
from localvit.surgery.projection import (
    LocalizedProjection,
    accept_state_dicts_without_locality,
    check_projection,
    has_other_forward,
    localized_projections,
    refuse_state_dicts_without_locality,
    remove_locality,
    replace_modules,
)
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.selection import FilterFn, select_sites, some
from localvit.surgery.sites import Grids, Site
from localvit.surgery.wrapped import refuse_wrapped
from localvit.tokens.mlp import LocalityMlp
from localvit.tokens.sources import disconnect

Model = TypeVar("Model", bound=nn.Module)
Trainable = Literal["all", "locality"]


@dataclass(frozen=True, kw_only=True)
class Localized:
    """What `localize` did to a model; it is stored as `model.localized`."""

    options: dict[str, Any]
    """Plain values for `localize_with_options`, which do the same to the same model again; JSON can store them."""


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
    sites = select_sites(model, blocks, filter_fn, grid, num_prefix_tokens)
    names = [site.projection_name for site in sites]
    if not inplace:
        model = copy.deepcopy(model)
        sites = select_sites(model, None, names, grid, num_prefix_tokens)
    if isinstance(method, Replace):
        replace_feed_forwards(sites, lambda site: method)
    else:
        _add_adapters(model, sites, method)
    if trainable == "locality":
        freeze_others(model)
    options = options_of(method)
    if grid is not None:
        options |= {"grid": grid, "num_prefix_tokens": num_prefix_tokens}
    if filter_fn is not None:
        options["filter_fn"] = names
    elif blocks is not None:
        options["blocks"] = blocks
    if trainable != "all":
        options["trainable"] = trainable
    model.localized = Localized(options=options)  # type: ignore[assignment]
    record_in_config(model, options)
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
            feed-forwards for good, when it was fused or something else has wrapped or parametrized the projections, or
            when an adapter is trained and `discard` is False. The model is then unchanged.
    """
    refuse_wrapped(model, "delocalize")
    kind = type(model).__name__
    if any(isinstance(module, LocalityMlp) for module in model.modules()):
        raise ValueError(
            f"{kind} has the paper's module in place of its feed-forwards, whose weights are gone: create the model "
            "again instead"
        )
    projections = localized_projections(model)
    if not projections:
        raise ValueError(f"{kind} is not localized")
    if wrapped := [name for name, projection in projections.items() if has_other_forward(projection)]:
        raise ValueError(
            f"the forward of {some(wrapped)} is wrapped, as fuse and accelerate's offloading do: delocalize the model "
            "before that"
        )
    if changed := [name for name, projection in projections.items() if type(projection) is not LocalizedProjection]:
        raise ValueError(
            f"the class of {some(changed)} was changed, as parametrizations do: call remove_parametrizations before "
            "delocalize"
        )
    trained = [name for name, projection in projections.items() if not projection.locality.is_neutral]
    if trained and not discard:
        raise ValueError(
            f"{len(trained)} of {len(projections)} adapters are trained ({some(trained)}), so the model computes "
            "something else without them: pass discard=True to remove them anyway"
        )
    if not inplace:
        model = copy.deepcopy(model)
    remove_locality(model)
    disconnect(model)
    refuse_state_dicts_without_locality(model)
    _unfreeze(model)
    if hasattr(model, "localized"):
        del model.localized
    remove_from_config(model)
    if isinstance(made_from := getattr(model, "made_from", None), dict):
        made_from["args"].pop("localize", None)
    return model


def locality_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that contain locality, adapters or the paper's module, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LocalityAdapter | LocalityMlp)}


def _check_model(model: nn.Module) -> None:
    refuse_wrapped(model, "localize")
    if found := locality_modules(model):
        kind = type(model).__name__
        raise ValueError(f"{kind} has locality already, in {len(found)} feed-forwards ({some(list(found))})")


def _add_adapters(model: nn.Module, sites: list[Site], method: Adapter) -> None:
    for site in sites:
        check_projection(site.projection, site.projection_name)
    grids = Grids()
    localized: dict[nn.Module, nn.Module] = {}
    first: dict[nn.Module, Site] = {}
    for site in sites:
        same = first.setdefault(site.projection, site)
        if same is not site:  # Blocks that share weights share locality, too.
            if not _on_one_grid(same, site):
                raise ValueError(
                    f"{site.projection_name} and {same.projection_name} are one module, which works on several grids: "
                    "leave it out with filter_fn"
                )
            continue
        factory = site.factory  # refuses quantized layers, which may have no widths either
        locality = LocalityAdapter(site.hidden_dim, method, **factory)
        projection = LocalizedProjection(site.projection, locality, site.layout(grids.of(site)))
        localized[site.projection] = projection.train(site.projection.training)
    # Nothing can fail from here on.
    grids.connect()
    replace_modules(model, localized)
    accept_state_dicts_without_locality(model)


def _on_one_grid(site: Site, other: Site) -> bool:
    return site.source is other.source or (
        type(site.source) is type(other.source) and vars(site.source) == vars(other.source)
    )


_FROZEN = "_frozen_by_localize"
"""Attribute of a module: the names of its own parameters that `trainable="locality"` has frozen. Names in the model
would not survive that blocks are removed or the head is replaced."""


def freeze_others(model: nn.Module) -> None:
    """Freeze every trainable parameter that is not of locality, and record which, so that `delocalize` can undo it."""
    own = {id(parameter) for module in locality_modules(model).values() for parameter in module.parameters()}
    for module in model.modules():
        trained = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in own
        }
        for parameter in trained.values():
            parameter.requires_grad_(False)
        if trained:
            vars(module)[_FROZEN] = tuple(trained)


def _unfreeze(model: nn.Module) -> None:
    for module in model.modules():
        for name in vars(module).pop(_FROZEN, ()):
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(True)
