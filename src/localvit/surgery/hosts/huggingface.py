"""The hosts of Hugging Face transformers: the vision towers, wherever they are inside a model.

Attention pooling heads, which see no patches one by one, are no sites. What older versions of the library call the
parts is read here too: until 5.8 some feed-forwards were in two parts, `intermediate` and `output`, and vision towers
inside a wrapper.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from localvit.surgery.sites import Site, Slot, find_sites, host, site
from localvit.tokens.grid import GridSource, patch_map
from localvit.tokens.layouts import TokenSequence
from localvit.tokens.ragged import PlacedTokens, Places, PlaceSource, places_of_shapes

LAYERS = ("layers", "encoder.layers", "encoder.layer", "model.layer", "layer")
"""Where towers keep their layers."""

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""The parameters of embeddings that come before the patches, (1, P, C) or (C)."""


@host(
    *(
        f"transformers.models.{name}"
        for name in (
            "vit.modeling_vit.ViTModel",
            "deit.modeling_deit.DeiTModel",
            "beit.modeling_beit.BeitModel",
            "dinov2.modeling_dinov2.Dinov2Model",
            "dinov2.modeling_dinov2.Dinov2Backbone",
            "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
            "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone",
            "dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",
            "dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone",
            "clip.modeling_clip.CLIPVisionModel",
            "clip.modeling_clip.CLIPVisionTransformer",
            "siglip.modeling_siglip.SiglipVisionModel",
            "siglip.modeling_siglip.SiglipVisionTransformer",
        )
    )
)
def vision_tower(model: Any) -> Iterator[Site]:
    """Tokens are the patches row by row behind prefix tokens; the patch embedding's convolution knows the grid."""
    if hasattr(model, "vision_model"):
        yield from find_sites(model.vision_model, "vision_model.")
        return
    [convolution] = [module for module in model.embeddings.modules() if isinstance(module, nn.Conv2d)]
    layout = partial(TokenSequence, num_prefix_tokens=_num_prefix_tokens(model.embeddings))
    yield from _in_order(model, patch_map(convolution), layout, _slot)


@host(
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel",
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionTransformer",
)
def tower_of_any_shapes(model: Any) -> Iterator[Site]:
    """Samples have grids of their own and padding, which the embeddings are told."""
    if hasattr(model, "vision_model"):
        yield from find_sites(model.vision_model, "vision_model.")
        return
    why = (
        "its images have grids of their own within a batch, and the paper's module takes means over maps (batch "
        "norm), which would count the places that they leave empty"
    )
    source = PlaceSource(model.embeddings, how=_places_of_siglip2)
    yield from _in_order(model, source, partial(PlacedTokens, always=True), lambda layer: why)


@host("transformers.models.swin.modeling_swin.SwinLayer")
def swin_layer(layer: Any) -> Iterator[Site]:
    """A layer is told the grid of its tokens. Its stochastic depth acts on the attention alone."""
    source = GridSource(layer, "follow_arguments", _input_dimensions)
    yield site(layer, "", source, mlp=_feed_forward(layer), slot=_slot(layer, shared=("dropout",)))


def _in_order(
    model: nn.Module,
    source: GridSource,
    layout: Callable[..., nn.Module],
    slot_of: Callable[[nn.Module], Slot | str],
) -> Iterator[Site]:
    there = dict(model.named_modules())
    layers = next((name for name in LAYERS if name in there), None)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} keeps its layers under no name that is known here ({', '.join(LAYERS)}): the "
            "version of transformers is too old or too new; name the projections with filter_fn and grid"
        )
    for name, layer in there[layers].named_children():
        yield site(model, f"{layers}.{name}", source, layout, mlp=_feed_forward(layer), slot=slot_of(layer))


def _feed_forward(layer: nn.Module) -> str:
    return "mlp" if hasattr(layer, "mlp") else "output"


def _num_prefix_tokens(embeddings: nn.Module) -> int:
    tokens = [token for name in PREFIX_TOKENS if (token := getattr(embeddings, name, None)) is not None]
    return sum(token.shape[1] if token.ndim == 3 else 1 for token in tokens)


def _slot(layer: nn.Module, shared: tuple[str, ...] = ("drop_path", "dropout")) -> Slot | str:
    """What the paper's form replaces in a layer; `shared` names what would act on it and is the attention's too."""
    kind = type(layer).__name__
    if not hasattr(layer, "mlp"):
        return f"{kind} has its feed-forward in two parts; in transformers 5.9 and newer it is one"
    for name in shared:
        dropped: Any = getattr(layer, name, None)
        if getattr(dropped, "p", getattr(dropped, "drop_prob", 0.0)) > 0:
            option = {"drop_path": "drop_path_rate", "dropout": "hidden_dropout_prob"}[name]
            return f"the one {name} of {kind} serves its attention too: make the model with {option}=0"
    scale = next((name for name in ("layer_scale2", "lambda_2") if hasattr(layer, name)), None)
    if scale and not isinstance(getattr(layer, scale), nn.Module | nn.Parameter):
        scale = None  # A number, 1: no layer scale.
    norm = next(name for name in ("layernorm_after", "norm2", "layer_norm2") if hasattr(layer, name))
    return Slot(norm=norm, drop_path=None, scale=scale)


def _input_dimensions(
    hidden_states: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any
) -> tuple[int, int]:
    return input_dimensions


def _places_of_siglip2(pixel_values: Tensor, spatial_shapes: Tensor) -> Places:
    return places_of_shapes(spatial_shapes.to(pixel_values.device), pixel_values.shape[1])
