"""A feed-forward's last projection with locality before it, in the place of the projection.

Shapes: B batch, E hidden channels, H and W the patch grid.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor, nn

from localvit.surgery.adapter import LocalityAdapter
from localvit.tokens.layouts import Layout, refuse_empty_positions

CHILD = "locality"
"""Name of the adapter in a localized projection."""

_MISSING = object()


@register_notrace_module  # Its forward branches on shapes, which a graph tracer cannot follow.
class LocalizedProjection(nn.Module):
    """Computes `projection(h + locality(h))` for the hidden tokens h of a feed-forward; other tokens pass unchanged.

    It takes the place of the projection and has its attributes, parameters, buffers, submodules and hooks under the
    same names, so that state dicts and optimizers find what they know. It is not an instance of the projection's
    class. So libraries that replace layers of known classes, for quantization or low-rank adaptation, leave it as it
    is or refuse it: in their layers there would be no locality, or locality at the wrong place.

    Args:
        projection: reads the hidden tokens. It is not used any more.
        locality: what is added to the hidden map.
        layout: how the tokens lie on the patch grid.

    Raises:
        ValueError: in forward, when the tokens do not fill the grid. There and here, for a gate or batch norm on maps
            with empty positions (`localvit.tokens.ragged`).
    """

    def __init__(self, projection: nn.Module, locality: LocalityAdapter, layout: Layout) -> None:
        super().__init__()
        vars(self).update(vars(projection))
        vars(self).pop("forward", None)
        self._modules = dict(projection._modules)
        self.projection_class = type(projection)
        self.layout = layout
        self.locality: Any = locality  # A `LocalityAdapter`, or what another library has wrapped around it.
        self._refuse_empty_positions()
        # PyTorch's encoder layers would run a kernel that calls no submodule, unless one of them has a hook.
        layout.register_forward_pre_hook(_prevent_fused_kernel)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._refuse_empty_positions()
        map_BEHW = self.layout.to_map(hidden)
        hidden = hidden + self.layout.to_tokens(self.locality(map_BEHW))
        return self.projection_class.forward(self, hidden, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the class of the projection has, such as Conv2d's method `_conv_forward`.
            attribute = inspect.getattr_static(vars(self).get("projection_class", object), name, _MISSING)
            if name.startswith("__") or attribute is _MISSING:
                raise
            return attribute.__get__(self, type(self)) if hasattr(attribute, "__get__") else attribute

    def fuse(self) -> nn.Module:
        """With a projection whose norm is folded, if it has one. timm's `reparameterize_model` calls it."""
        projection: Any = self.projection()
        if not hasattr(projection, "fuse"):
            return self
        return LocalizedProjection(projection.fuse(), self.locality, self.layout).train(self.training)

    def projection(self) -> nn.Module:
        """The projection without locality, as a new module with the same parameters."""
        projection = self.projection_class.__new__(self.projection_class)
        vars(projection).update(vars(self))
        vars(projection).pop("forward", None)
        projection._modules = dict(self._modules)
        del projection.projection_class, projection.layout, projection.locality
        return projection

    def extra_repr(self) -> str:
        return f"{self.projection_class.__name__}: {self.projection_class.extra_repr(self)}"

    def _refuse_empty_positions(self) -> None:
        if part := self.locality.part_with_means:
            refuse_empty_positions(self.layout, part)


def _prevent_fused_kernel(layout: nn.Module, args: tuple) -> None:
    pass


def check_projection(projection: nn.Module, name: str) -> None:
    """Raise ValueError for a projection that a `LocalizedProjection` cannot stand for."""
    kind = f"{name} ({type(projection).__name__})"
    if not name:
        raise ValueError(f"{kind} is the model itself: put it into a module that calls it")
    if has_other_forward(projection):
        raise ValueError(f"another library has wrapped the forward of {kind}: localize the model before it does")
    if hasattr(projection, "base_layer"):
        raise ValueError(
            f"{kind} wraps the projection to adapt it, as PEFT's layers do: localize the model before get_peft_model"
        )
    if taken := [child for child in (CHILD, "layout", "projection_class") if hasattr(projection, child)]:
        raise ValueError(f"{kind} has an attribute {taken[0]} of its own, which locality needs: rename it")
    if "__class__" in inspect.unwrap(type(projection).forward).__code__.co_freevars:
        raise ValueError(
            f"the forward of {kind} calls super(), so that nothing but an instance of its class can run it: use "
            "localvit.LocalityFeedForward in the code of the model instead"
        )


def has_other_forward(module: nn.Module) -> bool:
    """Whether an instance has a forward that is not its class's. accelerate sets the class's when it removes hooks."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not own


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules at every place of the model where they are."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def localized_projections(model: nn.Module) -> dict[str, LocalizedProjection]:
    """The projections of a model that have locality, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LocalizedProjection)}


def remove_locality(model: nn.Module) -> None:
    """Put the projections without locality in the place of the localized ones, in place."""
    replace_modules(model, {module: module.projection() for module in localized_projections(model).values()})


def accept_state_dicts_without_locality(model: nn.Module) -> None:
    """Let a state dict without any adapter, that of the model before `localize`, load strictly into `model`.

    The adapters then keep their weights; those on the meta device become new ones where the state dict is assigned. A
    state dict with some of the adapters only is still refused.
    """
    model.register_load_state_dict_pre_hook(_keep_adapters)


def refuse_state_dicts_without_locality(model: nn.Module) -> None:
    """Undo `accept_state_dicts_without_locality`."""
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _keep_adapters:
            del model._load_state_dict_pre_hooks[key]


def _keep_adapters(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    adapters = [module for module in model.modules() if isinstance(module, LocalityAdapter)]
    if not _adapter_state(model, prefix).keys().isdisjoint(state_dict):
        for adapter in adapters:
            adapter.never_initialized = False
        return
    values = (value for key, value in state_dict.items() if key.startswith(prefix) and value.is_floating_point())
    if local_metadata.get("assign_to_params_buffers") and (value := next(values, None)) is not None:
        for adapter in adapters:
            if any(weight.is_meta for weight in adapter.parameters()):
                adapter.to_empty(device=value.device).to(value.dtype)
    for adapter in adapters:
        if adapter.never_initialized and not any(weight.is_meta for weight in adapter.parameters()):
            adapter.reset_parameters()
    state_dict.update(_adapter_state(model, prefix))


def _adapter_state(model: nn.Module, prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in model.state_dict().items() if f".{CHILD}." in key}
