"""LocalViT on Transformer in Transformer: timm's TNT with the locality module as its outer feed-forward.

arXiv 2104.05707, Table 6; TNT is arXiv 2103.00112. The inner transformer, over the pixels of each patch, is unchanged.

Shapes: B batch, N patches (H x W), C outer width, c inner width, n pixels per patch (h x w).
"""

from types import MappingProxyType
from typing import Any

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.tnt import TNT
from torch import Tensor, nn

from localvit.models import positions
from localvit.models.family import Family, PositionGrids
from localvit.models.registry import ModelInfo, register_model
from localvit.surgery.blocks import BlockSelection, select_blocks
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.sites import local_sites
from localvit.tokens.grid import Size


def _keep_drop_path(block: Any) -> None:
    """Move the block's only stochastic depth module to the end of the three branches that keep it.

    timm's block calls a single `drop_path` after all four branches. Locality replaces the fourth, which has none.
    """
    for attention in (block.attn_in, block.attn_out):
        attention.proj_drop = nn.Sequential(attention.proj_drop, block.drop_path)
    block.mlp_in.drop2 = nn.Sequential(block.mlp_in.drop2, block.drop_path)
    block.drop_path = nn.Identity()


class LocalTNT(Family, TNT):
    """timm's TNT with locality in the outer feed-forward of the selected blocks.

    Takes images (B, in_chans, H, W) of any size that the patches divide. The patch position embeddings are resampled
    from the grid of `img_size`. Its arguments are timm's and those of `LocalViT`. `reduction` is `embed_dim` unless
    given. `legacy` (published) embeds the pixels of the whole image, otherwise those of each patch.

    Raises:
        ValueError: for a value of these arguments that does not exist, or an image that the patches do not divide.
    """

    pixel_embed: Any  # timm declares its sizes as int or tuple; they are tuples
    timm_cfg = MappingProxyType({"first_conv": "pixel_embed.proj"})
    published_keys = ((r"^(blocks\.\d+)\.mlp\.conv\.", r"\1.conv.conv."),)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        act: str | int = "hs+se",
        reduction: int | None = None,
        expand_ratio: float | None = None,
        depthwise: bool = True,
        depthwise_first: bool = False,
        local_blocks: BlockSelection = None,
        mlp_ratio: float = 4.0,
        legacy: bool = True,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, mlp_ratio=mlp_ratio, legacy=legacy, **factory, **kwargs)
        positions.patch_grid(self.pixel_embed.img_size, self.pixel_embed.patch_size)
        locality = Replace(
            act=act,
            reduction=self.embed_dim if reduction is None else reduction,
            expand_ratio=mlp_ratio if expand_ratio is None else expand_ratio,
            depthwise=depthwise,
            depthwise_first=depthwise_first,
        )
        for index in select_blocks(local_blocks, len(self.blocks)):
            _keep_drop_path(self.blocks[index])
        replace_feed_forwards(local_sites(self, local_blocks), lambda site: locality)

    def position_grids(self, img_size: tuple[int, int] | None = None) -> PositionGrids:
        grid_size = positions.patch_grid(img_size or self.pixel_embed.img_size, self.pixel_embed.patch_size)
        return {"patch_pos": (grid_size, self.num_prefix_tokens)}

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """Make `img_size` (height, width) the size that the model is made for, and resample its positions to it.

        Raises ValueError if the patches do not divide it, or for another `patch_size` than the model's.
        """
        old, embed = self.position_grids(), self.pixel_embed
        positions.check_patch_size(self, patch_size, embed.patch_size)
        img_size = positions.height_and_width(img_size or embed.img_size)
        embed.grid_size = positions.patch_grid(img_size, embed.patch_size)
        embed.img_size = img_size
        embed.num_patches = self.num_patches = embed.grid_size[0] * embed.grid_size[1]
        positions.resample_own(self, old)
        positions.record_input_size(self, img_size)

    def _embed(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel tokens (B * N, n, c) and patch tokens (B, 1 + N, C) of an image that the patches divide."""
        embed = self.pixel_embed
        batch = image_BCHW.shape[0]
        height, width = positions.patch_grid(image_BCHW.shape[-2:], embed.patch_size)
        if self.pixel_embed.legacy:
            windows_BNc = embed.unfold(embed.proj(image_BCHW)).transpose(1, 2)
            pixel_map = windows_BNc.reshape(batch * height * width, embed.in_dim, *embed.new_patch_size)
        else:
            windows_BNc = embed.unfold(image_BCHW).transpose(1, 2)
            pixel_map = embed.proj(windows_BNc.reshape(batch * height * width, self.in_chans, *embed.patch_size))
        pixel_map = pixel_map + self.pixel_pos
        pixels = pixel_map.flatten(2).transpose(1, 2).contiguous()  # otherwise every norm of every block copies them
        patches_BNC = self.norm2_proj(self.proj(self.norm1_proj(pixels.reshape(batch, height * width, -1))))
        tokens = torch.cat((self.cls_token.expand(batch, -1, -1), patches_BNC), dim=1)
        pos_1NC = positions.resample_positions(self.patch_pos, embed.grid_size, (height, width), self.num_prefix_tokens)
        return pixels, self.pos_drop(tokens + pos_1NC)

    def _outer_tokens(self, image_BCHW: Tensor, num_blocks: int | None = None) -> list[Tensor]:
        """The patch tokens after each of the first `num_blocks` blocks (by default all), before the last norm."""
        pixels, patches = self._embed(image_BCHW)
        after = []
        for block in self.blocks[:num_blocks]:
            if self.grad_checkpointing:
                pixels, patches = checkpoint(block, pixels, patches)
            else:
                pixels, patches = block(pixels, patches)
            after.append(patches)
        return after

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, C) of images (B, in_chans, H, W), class token first, after the last norm."""
        return self.norm(self._outer_tokens(x)[-1])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after the blocks in `indices`; arguments as in timm's `VisionTransformer.forward_intermediates`."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be NCHW or NLC")
        take, last = feature_take_indices(len(self.blocks), indices)
        after = self._outer_tokens(x, last + 1 if stop_early else None)
        taken = [self.norm(after[index]) if norm else after[index] for index in take]
        prefixes = [tokens[:, : self.num_prefix_tokens] for tokens in taken]
        features = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            grid_size = positions.patch_grid(x.shape[-2:], self.pixel_embed.patch_size)
            features = [tokens.unflatten(1, grid_size).permute(0, 3, 1, 2).contiguous() for tokens in features]
        intermediates = list(zip(features, prefixes, strict=True)) if return_prefix_tokens else features
        return intermediates if intermediates_only else (self.norm(after[-1]), intermediates)


_TINY = {"patch_size": 16, "embed_dim": 192, "inner_dim": 12, "depth": 12, "num_heads_inner": 3, "num_heads_outer": 3}

register_model(
    ModelInfo(
        name="localvit_tnt_t_patch16_224",
        alias="localvit_tnt_tiny",
        paper_name="LocalViT-TNT",
        family=LocalTNT,
        args=_TINY,
        parameters=6_261_064,
        multiply_adds=1_416_513_792,
        file="localvit_tnt.pth",
        acc1=75.896,
        acc5=92.898,
        loss=1.229,
    )
)
register_model(
    ModelInfo(
        name="localvit_tnt_s_patch16_224",
        alias="localvit_tnt_small",
        paper_name="LocalViT-TNT-S",
        family=LocalTNT,
        args={
            "patch_size": 16,
            "embed_dim": 384,
            "inner_dim": 24,
            "depth": 12,
            "num_heads_inner": 4,
            "num_heads_outer": 6,
        },
        parameters=24_137_848,
        multiply_adds=5_235_380_736,
    )
)
register_model(
    ModelInfo(
        name="tnt_t_patch16_224",  # the baseline: no block is local
        alias="tnt_tiny",
        paper_name="TNT-T",
        family=LocalTNT,
        args=_TINY | {"local_blocks": ()},
        parameters=6_069_784,
        multiply_adds=1_403_721_984,
    )
)
