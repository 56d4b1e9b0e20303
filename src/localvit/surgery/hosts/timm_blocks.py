"""Hosts of timm that are blocks: they know the grid of their feed-forward themselves, in whatever model they are.

Shapes: B batch, C channels, E hidden channels, H and W the patch grid.
"""

from collections.abc import Iterator
from typing import Any

from localvit.surgery.sites import Site, Slot, Unsupported, host, site
from localvit.tokens.layouts import ChannelsFirstMap, ChannelsLastMap
from localvit.tokens.sources import InputMap, OutputMap


@host(
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock",
    "timm.models.vision_transformer_sam.Block",
)
def block_that_reads_a_channels_last_map(block: Any) -> Iterator[Site]:
    """Reads (B, H, W, C), and its feed-forward reads the tokens in that order."""
    yield site(block, "", InputMap(block))


@host("timm.models.tiny_vit.TinyVitBlock")
def tiny_vit_block(block: Any) -> Iterator[Site]:
    """Reads (B, H, W, C); the feed-forward contains its norm."""
    yield site(block, "", InputMap(block), slot=Slot(norm=None))


@host("timm.models.davit.SpatialBlock", "timm.models.davit.ChannelBlock")
def block_that_reads_a_channels_first_map(block: Any) -> Iterator[Site]:
    """Reads (B, C, H, W), and its feed-forward, if it has one, reads the tokens row by row."""
    if block.mlp is not None:
        yield site(block, "", InputMap(block, height_dim=2))


@host("timm.models.csatv2.TransformerBlock", "timm.models.csatv2.SpatialTransformerBlock")
def block_that_may_pool(block: Any) -> Iterator[Site]:
    """If it pools, it does so before its position convolution, which therefore runs on the feed-forward's grid."""
    yield site(block, "", OutputMap(block.pos_embed.proj))


@host(
    "timm.models.gcvit.GlobalContextVitBlock",
    "timm.models.hieradet_sam2.MultiScaleBlock",
    "timm.models.maxxvit.PartitionAttentionCl",
    "timm.models.maxxvit.ParallelPartitionAttention",
    "timm.models.volo.Outlooker",
    "timm.models.volo.Transformer",
)
def feed_forward_on_a_channels_last_map(block: Any) -> Iterator[Site]:
    """The hidden tokens form a map (B, H, W, E)."""
    yield site(block, "", None, ChannelsLastMap)


@host("timm.models.maxxvit.TransformerBlock2d", "timm.models.maxxvit.PartitionAttention2d")
def feed_forward_of_convolutions(block: Any) -> Iterator[Site]:
    """The hidden tokens form a map (B, E, H, W)."""
    yield site(block, "", None, ChannelsFirstMap)


@host("timm.models.edgenext.SplitTransposeBlock")
def split_transpose_block(block: Any) -> Iterator[Site]:
    """The hidden tokens form a map (B, H, W, E)."""
    slot = Unsupported(
        "SplitTransposeBlock adds the feed-forward's output to the block's input, not to what the feed-forward reads"
    )
    yield site(block, "", None, ChannelsLastMap, slot=slot)
