"""Hosts of timm with one patch grid: ViT and its relatives, whose tokens are the patches row by row.

Shapes: B batch, C channels, H and W the patch grid.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from localvit.surgery.sites import LayoutFactory, Site, Slot, Unsupported, host, site
from localvit.tokens.layouts import TokenSequence
from localvit.tokens.sources import FixedGrid, GridSource, OutputMap, ResultGrid


def _patch_map(model: Any) -> OutputMap:
    """The map that the patch embedding's convolution returns, which `set_input_size` may replace."""
    return OutputMap(model.patch_embed.proj, within=model.patch_embed)


def in_order(model: nn.Module, blocks: str, source: GridSource, num_prefix_tokens: int) -> Iterator[Site]:
    """The sites of a sequence of blocks whose tokens are the patches, row by row, after prefix tokens."""
    layout = partial(TokenSequence, num_prefix_tokens=num_prefix_tokens)
    for name, _ in model.get_submodule(blocks).named_children():
        yield site(model, f"{blocks}.{name}", source, layout)


@host(
    "timm.models.beit.Beit",
    "timm.models.deepseek_vit.DeepseekVitEncoder",
    "timm.models.eva.Eva",
    "timm.models.qwen3_vit.Qwen3VitEncoder",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
)
def plain_transformer(model: Any) -> Iterator[Site]:
    """A sequence of blocks on the patch embedding's grid."""
    check_all_patches_stay(model)
    return in_order(model, "blocks", _patch_map(model), model.num_prefix_tokens)


@host("timm.models.vision_transformer.VisionTransformer")
def vision_transformer(model: Any) -> Iterator[Site]:
    """Also DeiT, ViTamin and the hybrids, also with blocks that run attention and feed-forward in parallel."""
    check_all_patches_stay(model)
    source = _patch_map(model)
    return blocks_of_any_kind(model, source, partial(TokenSequence, num_prefix_tokens=model.num_prefix_tokens))


def blocks_of_any_kind(model: Any, source: GridSource, layout: LayoutFactory) -> Iterator[Site]:
    """The sites of all kinds of blocks that timm's VisionTransformer can have."""
    for name, block in model.named_modules():
        if name.rpartition(".")[0] != "blocks":
            continue
        if hasattr(block, "ffns"):
            yield from _parallel_feed_forwards(model, name, source, layout)
        elif hasattr(block, "in_proj"):
            yield _parallel_to_attention(model, name, source, layout)
        else:
            yield site(model, name, source, layout)


def _parallel_feed_forwards(model: nn.Module, name: str, source: GridSource, layout: LayoutFactory) -> Iterator[Site]:
    """ParallelThingsBlock: several feed-forwards, each with a norm, a layer scale and a stochastic depth."""
    slot = Slot(norm="norm", drop_path="drop_path", scale="ls")
    for number, _ in model.get_submodule(f"{name}.ffns").named_children():
        found = site(model, f"{name}.ffns.{number}", source, layout, slot=slot)
        yield dataclasses.replace(found, block_name=name)


def _parallel_to_attention(model: nn.Module, name: str, source: GridSource, layout: LayoutFactory) -> Site:
    """ParallelScalingBlock: one projection computes queries, keys, values and hidden channels."""
    block = model.get_submodule(name)
    kind = type(block).__name__
    if getattr(block, "mlp_out_proj", None) is None:
        raise ValueError(
            f"{name} ({kind}) has one output projection for its attention and its feed-forward, so there is no module "
            "that reads only the hidden channels: create the model with fuse_out_proj=False, if it has that argument"
        )
    slot = Unsupported(f"the feed-forward of {kind} shares its norm and its first projection with the attention")
    return site(model, name, source, layout, mlp="mlp_out_proj", slot=slot)


def check_all_patches_stay(model: Any) -> None:
    """Raise ValueError for a model that drops patches in training."""
    rate = getattr(getattr(model, "patch_drop", None), "prob", 0.0)
    if rate:
        raise ValueError(
            f"{type(model).__name__} drops patches in training (patch_drop_rate={rate}), and the others do not form "
            "a map: create the model without patch_drop_rate"
        )


@host("timm.models.cait.Cait", "timm.models.xcit.Xcit")
def class_token_comes_last(model: Any) -> Iterator[Site]:
    """The blocks see patches only; the class token joins them in class attention, which has no sites."""
    return in_order(model, "blocks", _patch_map(model), 0)


@host("timm.models.convit.ConVit")
def class_token_comes_late(model: Any) -> Iterator[Site]:
    """The first blocks see patches only."""
    source = _patch_map(model)
    for index, (name, _) in enumerate(model.blocks.named_children()):
        layout = partial(TokenSequence, num_prefix_tokens=0 if index < model.local_up_to_layer else 1)
        yield site(model, f"blocks.{name}", source, layout)


@host("timm.models.tnt.TNT")
def transformer_in_transformer(model: Any) -> Iterator[Site]:
    """The outer feed-forwards, as in the paper; the inner transformers see the pixels of one patch only."""
    embed = model.pixel_embed
    source: GridSource
    if embed.legacy:
        source = ResultGrid(embed.proj, partial(_patches_of_pixels, patch_size=embed.new_patch_size))
    else:
        source = FixedGrid(embed.grid_size)
    slot: Slot | Unsupported
    for name, block in model.blocks.named_children():
        if isinstance(block.drop_path, nn.Identity):
            slot = Slot(norm="norm_mlp", drop_path=None)
        else:
            slot = Unsupported(
                f"the stochastic depth of {type(block).__name__} serves its attention too: create the model without "
                "drop_path_rate"
            )
        layout = partial(TokenSequence, num_prefix_tokens=model.num_prefix_tokens)
        yield site(model, f"blocks.{name}", source, layout, slot=slot)


def _patches_of_pixels(pixels_BCHW: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    return pixels_BCHW.shape[2] // patch_size[0], pixels_BCHW.shape[3] // patch_size[1]
