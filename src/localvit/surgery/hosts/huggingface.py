"""Hosts of Hugging Face transformers: the vision towers, wherever they are in a model.

The feed-forwards of attention pooling heads are not sites. The rules know the names of older versions too: until 5.8
some feed-forwards had two parts, `intermediate` and `output`, and some vision towers were inside a wrapper.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from localvit.surgery.sites import LayoutFactory, Site, Slot, Unsupported, find_sites, host, site
from localvit.tokens.layouts import TokenSequence
from localvit.tokens.ragged import ArgumentsPlacement, Placement, RaggedTokens, placement_of_shapes
from localvit.tokens.sources import ArgumentsGrid, GridSource, OutputMap

LAYERS = ("layers", "encoder.layers", "encoder.layer", "model.layer", "layer")
"""Names under which towers keep their layers."""

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Names of the embeddings' parameters that are prefix tokens, (1, P, C) or (C)."""


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
    """Tokens are the patches, row by row, after prefix tokens; the patch embedding's convolution knows the grid."""
    if hasattr(model, "vision_model"):
        yield from find_sites(model.vision_model, "vision_model.")
        return
    [convolution] = [module for module in model.embeddings.modules() if isinstance(module, nn.Conv2d)]
    layout = partial(TokenSequence, num_prefix_tokens=_num_prefix_tokens(model.embeddings))
    yield from _in_order(model, OutputMap(convolution), layout, _slot)


@host(
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel",
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionTransformer",
)
def ragged_vision_tower(model: Any) -> Iterator[Site]:
    """Each sample has its own grid, and padding; the grids are an argument of the embeddings."""
    if hasattr(model, "vision_model"):
        yield from find_sites(model.vision_model, "vision_model.")
        return
    slot = Unsupported(
        "the images of a batch have grids of different sizes, and the paper's module takes means over maps (batch "
        "norm), which would count the empty positions of the smaller ones"
    )
    source = ArgumentsPlacement(model.embeddings, _placement_of_siglip2)
    yield from _in_order(model, source, partial(RaggedTokens, always=True), lambda layer: slot)


@host("transformers.models.swin.modeling_swin.SwinLayer")
def swin_layer(layer: Any) -> Iterator[Site]:
    """The grid is an argument of the layer. Its stochastic depth acts on the attention only."""
    source = ArgumentsGrid(layer, _input_dimensions)
    yield site(layer, "", source, mlp=_feed_forward(layer), slot=_slot(layer, shared=("dropout",)))


@host("transformers.models.segformer.modeling_segformer.SegformerLayer")
def segformer_layer(layer: Any) -> Iterator[Site]:
    """The grid is an argument of the feed-forward, whose own depth-wise convolution comes before its activation."""
    slot = Unsupported(
        "the feed-forward of SegformerLayer has a depth-wise convolution already, and its layer gives it the grid as "
        "arguments, which the paper's module does not take"
    )
    yield site(layer, "", ArgumentsGrid(layer.mlp, _height_and_width), slot=slot)


def _in_order(
    model: nn.Module,
    source: GridSource,
    layout: LayoutFactory,
    slot_of: Callable[[nn.Module], Slot | Unsupported],
) -> Iterator[Site]:
    there = dict(model.named_modules())
    layers = next((name for name in LAYERS if name in there), None)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has none of the submodules {', '.join(LAYERS)}: this version of transformers is "
            "too old or too new; select the projections with filter_fn and grid"
        )
    for name, layer in there[layers].named_children():
        yield site(model, f"{layers}.{name}", source, layout, mlp=_feed_forward(layer), slot=slot_of(layer))


def _feed_forward(layer: nn.Module) -> str:
    return "mlp" if hasattr(layer, "mlp") else "output"


def _num_prefix_tokens(embeddings: nn.Module) -> int:
    tokens = [token for name in PREFIX_TOKENS if (token := getattr(embeddings, name, None)) is not None]
    return sum(token.shape[1] if token.ndim == 3 else 1 for token in tokens)


def _slot(layer: nn.Module, shared: tuple[str, ...] = ("drop_path", "dropout")) -> Slot | Unsupported:
    """The slot of a layer. `shared` names the modules that act on both attention and feed-forward."""
    kind = type(layer).__name__
    if not hasattr(layer, "mlp"):
        return Unsupported(f"the feed-forward of {kind} has two parts; in transformers 5.9 and newer it is one module")
    for name in shared:
        dropped: Any = getattr(layer, name, None)
        if getattr(dropped, "p", getattr(dropped, "drop_prob", 0.0)) > 0:
            option = {"drop_path": "drop_path_rate", "dropout": "hidden_dropout_prob"}[name]
            return Unsupported(f"the {name} of {kind} serves its attention too: create the model with {option}=0")
    scale = next((name for name in ("layer_scale2", "lambda_2") if hasattr(layer, name)), None)
    if scale and not isinstance(getattr(layer, scale), nn.Module | nn.Parameter):
        scale = None  # The number 1: no layer scale.
    norm = next(name for name in ("layernorm_after", "norm2", "layer_norm2") if hasattr(layer, name))
    return Slot(norm=norm, drop_path=None, scale=scale)


def _input_dimensions(
    hidden_states: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any
) -> tuple[int, int]:
    return input_dimensions


def _height_and_width(hidden_states: Tensor, height: int, width: int) -> tuple[int, int]:
    return height, width


def _placement_of_siglip2(pixel_values: Tensor, spatial_shapes: Tensor) -> Placement:
    return placement_of_shapes(spatial_shapes.to(pixel_values.device), pixel_values.shape[1])
