"""Hosts of timm that take patches with coordinates (NaFlex), so that a batch may hold images of several shapes.

They take images (B, C, H, W) too, whose tokens lie row by row on one grid.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from localvit.surgery.hosts.timm_plain import blocks_of_any_kind, check_all_patches_stay
from localvit.surgery.sites import Site, Unsupported, host, site
from localvit.tokens.grid import Size
from localvit.tokens.ragged import ArgumentsPlacement, Placement, RaggedTokens, placement_of_coordinates


@host("timm.models.naflexvit.NaFlexVit")
def naflex_vit(model: Any) -> Iterator[Site]:
    """The coordinates are an argument of the embeddings."""
    check_all_patches_stay(model)
    embeds = model.embeds
    source = ArgumentsPlacement(embeds, partial(_placement_of_naflex, embeds.patch_size, embeds.dynamic_img_pad))
    layout = partial(RaggedTokens, num_prefix_tokens=model.num_prefix_tokens)
    return blocks_of_any_kind(model, source, layout)


@host("timm.models.gemma4_vit.Gemma4VitEncoder")
def gemma4_vit(model: Any) -> Iterator[Site]:
    """The coordinates are an argument of the patch embedding."""
    source = ArgumentsPlacement(model.patch_embed, partial(_placement_of_gemma4, model.patch_embed.patch_size))
    slot = Unsupported("Gemma4Block has a norm after the feed-forward, and the paper's module has no such norm")
    for name, _ in model.blocks.named_children():
        yield site(model, f"blocks.{name}", source, RaggedTokens, slot=slot)


def _placement_of_naflex(
    patch_size: tuple[int, int],
    padded: bool,
    x: Tensor,
    patch_coord: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Placement | Size:
    if patch_coord is None:
        (height, width), (patch_height, patch_width) = x.shape[-2:], patch_size
        if padded:
            height, width = height + -height % patch_height, width + -width % patch_width
        return (height // patch_height, width // patch_width)
    return placement_of_coordinates(patch_coord, patch_valid)


def _placement_of_gemma4(
    patch_size: tuple[int, int],
    x: Any,
    patch_coord: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Placement | Size:
    if isinstance(x, dict):
        x, patch_coord, patch_valid = x["patches"], x.get("patch_coord", patch_coord), x.get("patch_valid", patch_valid)
    if patch_coord is None:
        return (x.shape[-2] // patch_size[0], x.shape[-1] // patch_size[1])
    if patch_valid is None:
        patch_valid = (patch_coord != -1).any(-1)  # How Gemma 4 marks padding.
    return placement_of_coordinates(patch_coord, patch_valid)
