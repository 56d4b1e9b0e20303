"""The hosts of timm: one rule a family, for which feed-forwards it has and how its tokens lie on the patch grid.

Feed-forwards that see the class token alone (class attention, attention pooling) are no sites: there are no neighbours.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from localvit.surgery.sites import GridSource, Site, Slot, host, patch_map, site, static_grid
from localvit.tokens import TokenSequence


def in_order(model: nn.Module, blocks: str, source: GridSource, num_prefix_tokens: int) -> Iterator[Site]:
    """The sites of plain blocks in a row, whose tokens are the patches row by row behind prefix tokens."""
    layout = partial(TokenSequence, num_prefix_tokens=num_prefix_tokens)
    for name, _ in model.get_submodule(blocks).named_children():
        yield site(model, f"{blocks}.{name}", source, layout)


@host("timm.models.vision_transformer.VisionTransformer", "timm.models.beit.Beit", "timm.models.eva.Eva")
def vision_transformer(model: Any) -> Iterator[Site]:
    return in_order(model, "blocks", patch_map(model.patch_embed.proj), model.num_prefix_tokens)


@host("timm.models.swin_transformer.SwinTransformerBlock")
def block_that_reads_a_map(block: Any) -> Iterator[Site]:
    """Blocks that read (B, H, W, C) and hand its tokens to the feed-forward in that order."""
    yield site(block, "", GridSource(block, "follow_input"))


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
