"""The hosts of timm: one rule a family, for which feed-forwards it has and how its tokens lie on the patch grid.

Feed-forwards that see the class token alone (class attention, attention pooling) are no sites: there are no neighbors.
Rules for whole models come first, then those for blocks that know their grid themselves, in whatever model they are.

Shapes: B batch, C channels, E hidden channels, H and W the patch grid.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from localvit.surgery.sites import Site, Slot, host, site
from localvit.tokens.grid import GridSource, patch_map, static_grid
from localvit.tokens.layouts import ChannelsFirstMap, ChannelsLastMap, TokenSequence


def in_order(model: nn.Module, blocks: str, source: GridSource, num_prefix_tokens: int) -> Iterator[Site]:
    """The sites of plain blocks in a row, whose tokens are the patches row by row behind prefix tokens."""
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
    """Blocks in a row on the patch embedding's grid."""
    check_all_patches_stay(model)
    return in_order(model, "blocks", patch_map(model.patch_embed.proj, model.patch_embed), model.num_prefix_tokens)


@host("timm.models.vision_transformer.VisionTransformer")
def vision_transformer(model: Any) -> Iterator[Site]:
    """Also DeiT, ViTamin and the hybrids, and with the blocks whose attention and feed-forwards go side by side."""
    check_all_patches_stay(model)
    source = patch_map(model.patch_embed.proj, model.patch_embed)
    return blocks_of_any_kind(model, source, partial(TokenSequence, num_prefix_tokens=model.num_prefix_tokens))


def blocks_of_any_kind(model: Any, source: GridSource, layout: Any) -> Iterator[Site]:
    """The sites of the blocks that timm's VisionTransformer may be made of."""
    for name, block in model.named_modules():
        if name.rpartition(".")[0] != "blocks":
            continue
        if hasattr(block, "ffns"):
            yield from _side_by_side(model, name, source, layout)
        elif hasattr(block, "in_proj"):
            yield _beside_attention(model, name, source, layout)
        else:
            yield site(model, name, source, layout)


def _side_by_side(model: nn.Module, name: str, source: GridSource, layout: Any) -> Iterator[Site]:
    """ParallelThingsBlock: feed-forwards that each have a norm, a layer scale and a stochastic depth."""
    slot = Slot(norm="norm", drop_path="drop_path", scale="ls")
    for number, _ in model.get_submodule(f"{name}.ffns").named_children():
        found = site(model, f"{name}.ffns.{number}", source, layout, slot=slot)
        yield dataclasses.replace(found, block_name=name)


def _beside_attention(model: nn.Module, name: str, source: GridSource, layout: Any) -> Site:
    """ParallelScalingBlock: one projection makes queries, keys, values and hidden channels together."""
    block = model.get_submodule(name)
    kind = type(block).__name__
    if getattr(block, "mlp_out_proj", None) is None:
        raise ValueError(
            f"{name} ({kind}) has one output projection for its attention and its feed-forward, so there is no module "
            "that reads the hidden channels alone: make the model with fuse_out_proj=False, where it has that"
        )
    why = f"the feed-forward of {kind} shares its norm and its first projection with the attention"
    return site(model, name, source, layout, mlp="mlp_out_proj", slot=why)


def check_all_patches_stay(model: Any) -> None:
    """Raise ValueError for a model that drops patches in training."""
    rate = getattr(getattr(model, "patch_drop", None), "prob", 0.0)
    if rate:
        raise ValueError(
            f"{type(model).__name__} drops patches in training (patch_drop_rate={rate}), and what is left is no map: "
            "make the model without patch_drop_rate"
        )


@host("timm.models.cait.Cait", "timm.models.xcit.Xcit")
def class_token_comes_last(model: Any) -> Iterator[Site]:
    """The blocks see patches alone; the class token joins them in class attention, which has no sites."""
    return in_order(model, "blocks", patch_map(model.patch_embed.proj, model.patch_embed), 0)


@host("timm.models.convit.ConVit")
def class_token_comes_late(model: Any) -> Iterator[Site]:
    """The first blocks see patches alone."""
    source = patch_map(model.patch_embed.proj, model.patch_embed)
    for index, (name, _) in enumerate(model.blocks.named_children()):
        layout = partial(TokenSequence, num_prefix_tokens=0 if index < model.local_up_to_layer else 1)
        yield site(model, f"blocks.{name}", source, layout)


@host("timm.models.tnt.TNT")
def transformer_in_transformer(model: Any) -> Iterator[Site]:
    """The outer feed-forwards, as in the paper; the inner transformers see the pixels of one patch."""
    embed = model.pixel_embed
    if embed.legacy:
        source = GridSource(embed.proj, "follow_result", partial(_patches_of_pixels, patch_size=embed.new_patch_size))
    else:
        source = static_grid(embed.grid_size)
    for name, block in model.blocks.named_children():
        if isinstance(block.drop_path, nn.Identity):
            slot: Slot | str = Slot(norm="norm_mlp", drop_path=None)
        else:
            slot = "the block's one stochastic depth serves its attention too: make the model without drop_path_rate"
        layout = partial(TokenSequence, num_prefix_tokens=model.num_prefix_tokens)
        yield site(model, f"blocks.{name}", source, layout, slot=slot)


def _patches_of_pixels(pixels_BCHW: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    return pixels_BCHW.shape[2] // patch_size[0], pixels_BCHW.shape[3] // patch_size[1]


@host(
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock",
    "timm.models.vision_transformer_sam.Block",
)
def block_that_reads_a_channels_last_map(block: Any) -> Iterator[Site]:
    """Reads (B, H, W, C) and hands its tokens to the feed-forward in that order."""
    yield site(block, "", GridSource(block, "follow_input"))


@host("timm.models.tiny_vit.TinyVitBlock")
def tiny_vit_block(block: Any) -> Iterator[Site]:
    """Reads (B, H, W, C); the feed-forward holds its norm itself."""
    yield site(block, "", GridSource(block, "follow_input"), slot=Slot(norm=None))


@host("timm.models.davit.SpatialBlock", "timm.models.davit.ChannelBlock")
def block_that_reads_a_channels_first_map(block: Any) -> Iterator[Site]:
    """Reads (B, C, H, W) and hands its tokens to the feed-forward, which it may lack, row by row."""
    if block.mlp is not None:
        yield site(block, "", GridSource(block, "follow_input", 2))


@host("timm.models.csatv2.TransformerBlock", "timm.models.csatv2.SpatialTransformerBlock")
def block_that_may_pool(block: Any) -> Iterator[Site]:
    """Pools before its position convolution, if at all, which therefore runs on the feed-forward's grid."""
    yield site(block, "", patch_map(block.pos_embed.proj))


@host(
    "timm.models.gcvit.GlobalContextVitBlock",
    "timm.models.hieradet_sam2.MultiScaleBlock",
    "timm.models.maxxvit.PartitionAttentionCl",
    "timm.models.maxxvit.ParallelPartitionAttention",
    "timm.models.volo.Outlooker",
    "timm.models.volo.Transformer",
)
def feed_forward_on_a_channels_last_map(block: Any) -> Iterator[Site]:
    """The hidden map is (B, H, W, E)."""
    yield site(block, "", None, ChannelsLastMap)


@host("timm.models.maxxvit.TransformerBlock2d", "timm.models.maxxvit.PartitionAttention2d")
def feed_forward_of_convolutions(block: Any) -> Iterator[Site]:
    """The hidden map is (B, E, H, W)."""
    yield site(block, "", None, ChannelsFirstMap)


@host("timm.models.edgenext.SplitTransposeBlock")
def split_transpose_block(block: Any) -> Iterator[Site]:
    """The hidden map is (B, H, W, E)."""
    why = "SplitTransposeBlock adds the feed-forward's output to its own input, not to what the feed-forward reads"
    yield site(block, "", None, ChannelsLastMap, slot=why)
