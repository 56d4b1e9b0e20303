"""The hosts of timm whose tokens may come with their places (NaFlex): images of many shapes in one batch.

They take images (B, C, H, W) too; the tokens then lie row by row on one grid.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from localvit.surgery.hosts.timm_plain import blocks_of_any_kind, check_all_patches_stay
from localvit.surgery.sites import Site, host, site
from localvit.tokens.ragged import PlacedTokens, Places, PlaceSource, places_of_coordinates


@host("timm.models.naflexvit.NaFlexVit")
def naflex_vit(model: Any) -> Iterator[Site]:
    """The embeddings are told the places."""
    check_all_patches_stay(model)
    embeds = model.embeds
    source = PlaceSource(embeds, how=partial(_places_of_naflex, embeds.patch_size, embeds.dynamic_img_pad))
    layout = partial(PlacedTokens, num_prefix_tokens=model.num_prefix_tokens)
    return blocks_of_any_kind(model, source, layout)


@host("timm.models.gemma4_vit.Gemma4VitEncoder")
def gemma4_vit(model: Any) -> Iterator[Site]:
    """The patch embedding is told the places."""
    source = PlaceSource(model.patch_embed, how=partial(_places_of_gemma4, model.patch_embed.patch_size))
    why = "Gemma4Block norms what the feed-forward returns, too, and the paper's module has no such norm"
    for name, _ in model.blocks.named_children():
        yield site(model, f"blocks.{name}", source, PlacedTokens, slot=why)


def _places_of_naflex(
    patch_size: tuple[int, int],
    padded: bool,
    x: Tensor,
    patch_coord: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Places:
    if patch_coord is None:
        (height, width), (patch_height, patch_width) = x.shape[-2:], patch_size
        if padded:
            height, width = height + -height % patch_height, width + -width % patch_width
        return (height // patch_height, width // patch_width), None
    return places_of_coordinates(patch_coord, patch_valid)


def _places_of_gemma4(
    patch_size: tuple[int, int],
    x: Any,
    patch_coord: Tensor | None = None,
    patch_valid: Tensor | None = None,
) -> Places:
    if isinstance(x, dict):
        x, patch_coord, patch_valid = x["patches"], x.get("patch_coord", patch_coord), x.get("patch_valid", patch_valid)
    if patch_coord is None:
        return (x.shape[-2] // patch_size[0], x.shape[-1] // patch_size[1]), None
    if patch_valid is None:
        patch_valid = (patch_coord != -1).any(-1)  # How Gemma 4 marks padding.
    return places_of_coordinates(patch_coord, patch_valid)
