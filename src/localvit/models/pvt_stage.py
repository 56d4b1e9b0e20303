"""One stage of the Pyramid Vision Transformer (PVT v1, arXiv 2102.12122, section 3).

Shapes: B batch, N tokens, P prefix tokens (the class token in the last stage), C width of the stage, H and W its grid.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from timm.layers import DropPath, Mlp, PatchEmbed
from timm.models import checkpoint
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from localvit.models import positions
from localvit.surgery.hosts.timm_plain import in_order
from localvit.surgery.sites import Site, host
from localvit.tokens.sources import OutputMap

Size = tuple[int, int]


class Block(nn.Module):
    """Pre-norm transformer block with spatial-reduction attention: tokens (B, N, C) of a grid (H, W) in and out.

    `sr_ratio` is the factor by which the grid of keys and values is smaller. If it is 1, prefix tokens may come first.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        *,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.attn = Attention(dim, num_heads, sr_ratio, attn_drop=attn_drop, proj_drop=proj_drop, **factory)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid_size: tuple[int, int]) -> Tensor:
        x_BNC = x_BNC + self.drop_path1(self.attn(self.norm1(x_BNC), grid_size))
        return x_BNC + self.drop_path2(self.mlp(self.norm2(x_BNC)))


class Stage(nn.Module):
    """Patch embedding, position embedding and blocks of one width.

    Takes a map (B, in_chans, H * patch_size, W * patch_size) and the class token, or None for a stage without one.
    Returns the tokens (B, P + H * W, C) and their grid (H, W).
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        dim: int,
        num_prefix_tokens: int,
        blocks: Sequence[Block],
        *,
        pos_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_prefix_tokens = num_prefix_tokens
        self.grad_checkpointing = False
        norm_layer = partial(nn.LayerNorm, eps=1e-5, **factory)
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, dim, norm_layer, output_fmt="NHWC", strict_img_size=False, **factory
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, num_prefix_tokens + self.patch_embed.num_patches, dim, **factory))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, map_BCHW: Tensor, cls_token_11C: Tensor | None) -> tuple[Tensor, Size]:
        x_BHWC = self.patch_embed(map_BCHW)
        grid_size = (x_BHWC.shape[1], x_BHWC.shape[2])
        x_BNC = x_BHWC.flatten(1, 2)
        if cls_token_11C is not None:
            x_BNC = torch.cat((cls_token_11C.expand(x_BNC.shape[0], -1, -1), x_BNC), dim=1)
        own_grid = self.patch_embed.grid_size
        pos_1NC = positions.resample_positions(self.pos_embed, own_grid, grid_size, self.num_prefix_tokens)
        x_BNC = self.pos_drop(x_BNC + pos_1NC)
        for block in self.blocks:
            x_BNC = checkpoint(block, x_BNC, grid_size) if self.grad_checkpointing else block(x_BNC, grid_size)
        return x_BNC, grid_size


@host(f"{__name__}.Stage")
def _sites(stage: Stage) -> Iterator[Site]:
    return in_order(
        stage, "blocks", OutputMap(stage.patch_embed.proj, within=stage.patch_embed), stage.num_prefix_tokens
    )
