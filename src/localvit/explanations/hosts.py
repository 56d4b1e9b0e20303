"""The rules that find the attentions and blocks of each family of models (see `localvit.explanations.layers`)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.swin_transformer import window_partition
from torch import nn

from localvit.explanations.layers import (
    AttentionLayer,
    ModelLayers,
    Placement,
    Size,
    TokenGrid,
    TokenLayer,
    layers_of_class,
)

GridOfImage = Callable[[Size], TokenGrid]


@layers_of_class(
    "timm.models.beit.Beit",
    "timm.models.eva.Eva",
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
)
def plain_transformer(model: Any) -> ModelLayers:
    """A sequence of blocks on the grid of the patch embedding; also DeiT and T2T-ViT.

    The linear attention of T2T's tokenizer computes no weights, so it is not among the attentions.
    """
    grid: GridOfImage = partial(_embedded_grid, model)
    reads_class = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
    return ModelLayers(
        attentions=tuple(_attentions_in(model, "blocks", grid)),
        blocks=tuple(_blocks_in(model, "blocks", grid)),
        last_norm=TokenLayer(name="norm", module=model.norm, grid=grid),
        reads_class_token=reads_class,
        num_class_tokens=2 if hasattr(model, "head_dist") else 1,
    )


def _embedded_grid(model: Any, image_size: Size) -> TokenGrid:
    return TokenGrid(
        size=tuple(model.patch_embed.dynamic_feat_size(image_size)), num_prefix_tokens=model.num_prefix_tokens
    )


@layers_of_class("localvit.models.pvt.LocalPVT")
def pyramid(model: Any) -> ModelLayers:
    """Stages with smaller and smaller grids; keys and values lie on a grid reduced by a strided convolution."""
    attentions: list[AttentionLayer] = []
    blocks: list[TokenLayer] = []
    stride = 1
    for number, stage in enumerate(model.stages):
        stride *= stage.patch_embed.patch_size[0]
        grid: GridOfImage = partial(_strided_grid, stride, stage.num_prefix_tokens)
        prefix = f"stages.{number}.blocks"
        blocks += _blocks_in(model, prefix, grid)
        for name, block in stage.blocks.named_children():
            place = partial(_reduced, block.attn, grid)
            attentions.append(AttentionLayer(name=f"{prefix}.{name}.attn", module=block.attn, placement=place))
    return ModelLayers(
        attentions=tuple(attentions),
        blocks=tuple(blocks),
        last_norm=TokenLayer(name="norm", module=model.norm, grid=grid),
        reads_class_token=model.global_pool == "token",
    )


def _strided_grid(stride: int, num_prefix_tokens: int, image_size: Size) -> TokenGrid:
    return TokenGrid(size=(image_size[0] // stride, image_size[1] // stride), num_prefix_tokens=num_prefix_tokens)


def _reduced(attn: Any, grid: GridOfImage, image_size: Size) -> Placement:
    query = grid(image_size)
    if attn.sr is None:
        return Placement.full(query)
    (row_stride, column_stride) = attn.sr.stride
    return Placement.full(query, TokenGrid(size=(query.size[0] // row_stride, query.size[1] // column_stride)))


@layers_of_class("timm.models.tnt.TNT")
def transformer_in_transformer(model: Any) -> ModelLayers:
    """An inner attention on the pixels of each patch, and an outer one between patches, in each block."""
    embed = model.pixel_embed
    grid: GridOfImage = partial(_patch_grid, embed.patch_size, model.num_prefix_tokens)
    attentions: list[AttentionLayer] = []
    for name, block in model.blocks.named_children():
        inner = partial(_pixels_of_patches, embed.new_patch_size, grid)
        outer = partial(_all_of, grid)
        attentions += [
            AttentionLayer(name=f"blocks.{name}.attn_in", module=block.attn_in, placement=inner, is_inner=True),
            AttentionLayer(name=f"blocks.{name}.attn_out", module=block.attn_out, placement=outer),
        ]
    return ModelLayers(
        attentions=tuple(attentions),
        blocks=tuple(_blocks_in(model, "blocks", grid, item=1)),
        last_norm=TokenLayer(name="norm", module=model.norm, grid=grid),
        reads_class_token=model.global_pool == "token",
    )


def _patch_grid(patch_size: Size, num_prefix_tokens: int, image_size: Size) -> TokenGrid:
    size = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
    return TokenGrid(size=size, num_prefix_tokens=num_prefix_tokens)


def _pixels_of_patches(pixels: Size, grid: GridOfImage, image_size: Size) -> Placement:
    height, width = grid(image_size).size
    whole = TokenGrid(size=(height * pixels[0], width * pixels[1]))
    index = torch.arange(len(whole)).view(1, *whole.size, 1)
    return Placement.windows(whole, window_partition(index, pixels).flatten(1))


@layers_of_class("timm.models.swin_transformer.SwinTransformer", "timm.models.swin_transformer_v2.SwinTransformerV2")
def shifted_windows(model: Any) -> ModelLayers:
    """Attention in windows, which every second block shifts; the head averages the tokens."""
    attentions: list[AttentionLayer] = []
    blocks: list[TokenLayer] = []
    for number, stage in enumerate(model.layers):
        grid: GridOfImage = partial(_halved_grid, model, number)
        prefix = f"layers.{number}.blocks"
        blocks += _blocks_in(model, prefix, grid)
        for name, block in stage.blocks.named_children():
            place = partial(_windows_of, block, grid)
            attentions.append(AttentionLayer(name=f"{prefix}.{name}.attn", module=block.attn, placement=place))
    return ModelLayers(
        attentions=tuple(attentions),
        blocks=tuple(blocks),
        last_norm=TokenLayer(name="norm", module=model.norm, grid=grid),
        reads_class_token=False,
    )


def _halved_grid(model: Any, times: int, image_size: Size) -> TokenGrid:
    height, width = model.patch_embed.dynamic_feat_size(image_size)
    return TokenGrid(size=(-(-height // 2**times), -(-width // 2**times)))


def _windows_of(block: Any, grid: GridOfImage, image_size: Size) -> Placement:
    """The windows of a block: where the block's cyclic shift, padding and partition bring each position."""
    tokens = grid(image_size)
    (height, width), (win_height, win_width) = tokens.size, block.window_size
    index = torch.arange(len(tokens)).view(1, height, width, 1)
    index = index.roll((-block.shift_size[0], -block.shift_size[1]), dims=(1, 2))
    index = F.pad(index, (0, 0, 0, -width % win_width, 0, -height % win_height), value=-1)
    return Placement.windows(tokens, window_partition(index, (win_height, win_width)).flatten(1))


@layers_of_class(
    *(
        f"transformers.models.{name}"
        for name in (
            "vit.modeling_vit.ViTModel",
            "deit.modeling_deit.DeiTModel",
            "dinov2.modeling_dinov2.Dinov2Model",
            "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
            "clip.modeling_clip.CLIPVisionModel",
            "clip.modeling_clip.CLIPVisionTransformer",
        )
    )
)
def vision_tower(model: Any) -> ModelLayers:
    """A vision tower of Hugging Face transformers with a class token."""
    there = dict(model.named_modules())
    if (inner := there.get("vision_model")) is not None:
        return vision_tower(inner)
    layers = next((name for name in ("layers", "encoder.layers", "encoder.layer", "layer") if name in there), None)
    norm = next((name for name in ("layernorm", "post_layernorm") if name in there), None)
    if layers is None or norm is None:
        raise ValueError(f"{type(model).__name__} of this version of transformers has layers of unknown names")
    [convolution] = [module for module in model.embeddings.modules() if isinstance(module, nn.Conv2d)]
    grid: GridOfImage = partial(_patch_grid, to_2tuple(convolution.stride), _num_prefix_tokens(model.embeddings))
    return ModelLayers(
        attentions=tuple(_attentions_in(model, layers, grid)),
        blocks=tuple(_blocks_in(model, layers, grid, item=0)),
        last_norm=TokenLayer(name=norm, module=there[norm], grid=grid),
        reads_class_token=True,
        num_class_tokens=2 if hasattr(model.embeddings, "distillation_token") else 1,
    )


def _num_prefix_tokens(embeddings: Any) -> int:
    names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    tokens = [token for name in names if (token := getattr(embeddings, name, None)) is not None]
    return sum(token.shape[1] if token.ndim == 3 else 1 for token in tokens)


def _blocks_in(model: nn.Module, name: str, grid: GridOfImage, item: int | None = None) -> Iterator[TokenLayer]:
    for child, block in model.get_submodule(name).named_children():
        yield TokenLayer(name=f"{name}.{child}", module=block, grid=grid, item=item)


def _attentions_in(model: nn.Module, name: str, grid: GridOfImage) -> Iterator[AttentionLayer]:
    """The attentions in each block: its innermost modules of that name, or the block itself, which then attends."""
    for child, block in model.get_submodule(name).named_children():
        found = {part_name: part for part_name, part in block.named_modules() if part_name and _is_attention(part)}
        innermost = {
            part_name: part
            for part_name, part in found.items()
            if not any(other.startswith(f"{part_name}.") for other in found)
        }
        for part_name, part in (innermost or {"": block}).items():
            full_name = ".".join(filter(None, (name, child, part_name)))
            yield AttentionLayer(name=full_name, module=part, placement=partial(_all_of, grid))


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") or "AttentionRope" in type(module).__name__


def _all_of(grid: GridOfImage, image_size: Size) -> Placement:
    return Placement.full(grid(image_size))
