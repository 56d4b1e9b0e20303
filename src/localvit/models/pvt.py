"""LocalViT on the Pyramid Vision Transformer (PVT v1), and the baseline itself, which timm does not have.

PVT is arXiv 2102.12122: four stages with smaller and smaller grids, and attention with spatially reduced keys and
values. LocalViT-PVT is arXiv 2104.05707, Table 6: every feed-forward is the locality module, and the reduction of its
gate is the width of the stage.

Shapes: B batch, N tokens (class token first in the last stage), C width of a stage, H and W its grid.
"""

from collections.abc import Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from timm.layers import global_pool_nlc, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from localvit.models import positions
from localvit.models.family import Family, PositionGrids
from localvit.models.pvt_stage import Block, Size, Stage
from localvit.models.registry import ModelInfo, register_model
from localvit.surgery.blocks import BlockSelection
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.sites import Site, local_sites


class LocalPVT(Family, nn.Module):
    """Pyramid Vision Transformer with locality in the feed-forward of the selected blocks.

    Takes images (B, in_chans, H, W) of any size that is a multiple of 32 pixels, the patch size of all stages. Position
    embeddings are resampled from the grids of `img_size`.

    Args:
        img_size: height and width, in pixels, of the images that the position embeddings are made for.
        in_chans, num_classes: channels of the images and classes of the head; 0 classes for no head.
        global_pool: the head reads "token", the class token; "avg", the mean of the image tokens; "", all tokens.
        patch_sizes, embed_dims, depths, num_heads, mlp_ratios, sr_ratios: one value per stage.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after the positions, in
            feed-forwards and after attention, and on attention weights.
        drop_path_rate: stochastic depth of the last block. It grows linearly from 0 in the first block.
        act, reduction, expand_ratio, depthwise, depthwise_first: see `localvit.Replace`;
            `reduction` is each stage's width and `expand_ratio` its value of `mlp_ratios` unless given.
        local_blocks: as for `LocalViT`, counted through all stages. With an empty list the model is PVT.

    Raises:
        ValueError: for a value of these arguments that does not exist, or an image that the patches do not divide.
    """

    timm_cfg = MappingProxyType({"first_conv": "stages.0.patch_embed.proj"})
    out_indices = (0, 1, 2, 3)
    published_keys = tuple(
        rule
        for i in range(4)
        for rule in (
            (rf"^stages\.{i}\.blocks\.(\d+)\.mlp\.conv\.", rf"block{i + 1}.\1.conv.conv."),
            (rf"^stages\.{i}\.blocks\.", f"block{i + 1}."),
            (rf"^stages\.{i}\.(patch_embed|pos_embed)", rf"\g<1>{i + 1}"),
        )
    )

    stages: Any  # An nn.ModuleList of Stage. mypy does not know the type of its items.
    norm: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act: str | int = "hs+se",
        reduction: int | None = None,
        expand_ratio: float | None = None,
        depthwise: bool = True,
        depthwise_first: bool = False,
        local_blocks: BlockSelection = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        drops = {"proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate}
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.num_prefix_tokens = 1
        self.patch_size = to_2tuple(prod(patch_sizes))
        positions.patch_grid(to_2tuple(img_size), self.patch_size)
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim, **factory))
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for i, (dim, depth, patch_size) in enumerate(zip(embed_dims, depths, patch_sizes, strict=True)):
            first, stride = sum(depths[:i]), prod(patch_sizes[:i])
            blocks = [
                Block(dim, num_heads[i], mlp_ratios[i], sr_ratios[i], drop_path=drop_path, **drops, **factory)
                for drop_path in drop_paths[first : first + depth]
            ]
            stage = Stage(
                (to_2tuple(img_size)[0] // stride, to_2tuple(img_size)[1] // stride),
                patch_size,
                embed_dims[i - 1] if i else in_chans,
                dim,
                self.num_prefix_tokens if i == len(depths) - 1 else 0,
                blocks,
                pos_drop=pos_drop_rate,
                **factory,
            )
            self.stages.append(stage)
            self.feature_info.append({"module": f"stages.{i}", "num_chs": dim, "reduction": stride * patch_size})

        def locality_of(site: Site) -> Replace:
            return Replace(
                act=act,
                reduction=site.dim if reduction is None else reduction,
                expand_ratio=site.expand_ratio if expand_ratio is None else expand_ratio,
                depthwise=depthwise,
                depthwise_first=depthwise_first,
            )

        replace_feed_forwards(local_sites(self, local_blocks), locality_of)
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_weights_vit_timm(module)
        for position in (self.cls_token, *(stage.pos_embed for stage in self.stages)):
            trunc_normal_(position, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay. The position embeddings have weight decay."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign every parameter to a stage (`coarse`) or a block, for layer-wise learning rates."""
        last = len(self.stages) - 1
        fine = [
            (r"^stages\.(\d+)\.(?:patch_embed|pos_embed)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^cls_token", (last, 0)),
            (r"^norm", (99999,)),
        ]
        stages = [(r"^stages\.(\d+)", None), (r"^cls_token", (last,)), (r"^norm", (99999,))]
        return {"stem": r"^stages\.0\.(?:patch_embed|pos_embed)", "blocks": stages if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` (0 for none), and change the pooling if one is given."""
        if global_pool is not None:
            if global_pool not in ("", "token", "avg"):
                raise ValueError(f"global_pool={global_pool!r} must be 'token', 'avg' or '' (none)")
            if global_pool == "token" and self.cls_token is None:
                raise ValueError("global_pool='token' needs the last stage, which was pruned: choose 'avg' or ''")
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def position_grids(self, img_size: tuple[int, int] | None = None) -> PositionGrids:
        """Grid and prefix tokens of each stage's positions for images of `img_size`, the model's own by default."""
        grids = {}
        size = img_size or self.stages[0].patch_embed.img_size
        for i, stage in enumerate(self.stages):
            size = positions.patch_grid(size, stage.patch_embed.patch_size)
            grids[f"stages.{i}.pos_embed"] = (size, stage.num_prefix_tokens)
        return grids

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """Make `img_size` (height, width) the size that the model is made for, and resample its positions to it.

        Raises ValueError if the patches do not divide it, or for another `patch_size` than that of all stages.
        """
        old = self.position_grids()
        positions.check_patch_size(self, patch_size, self.patch_size)
        img_size = size = positions.height_and_width(img_size or self.stages[0].patch_embed.img_size)
        positions.patch_grid(size, self.patch_size)
        for stage in self.stages:
            stage.patch_embed.set_input_size(size)
            size = stage.patch_embed.grid_size
        positions.resample_own(self, old)
        positions.record_input_size(self, img_size)

    def _run_stages(self, image_BCHW: Tensor, num_stages: int | None = None) -> list[tuple[Tensor, Size]]:
        """Tokens and grid after each of the first `num_stages` stages (by default all), before the last norm."""
        positions.patch_grid(image_BCHW.shape[-2:], self.patch_size)
        after: list[tuple[Tensor, Size]] = []
        for stage in self.stages[:num_stages]:
            map_BCHW = _to_map(*after[-1]) if after else image_BCHW
            after.append(stage(map_BCHW, self.cls_token if stage.num_prefix_tokens else None))
        return after

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, C) of the last stage, class token first, after the last norm."""
        return self.norm(self._run_stages(x)[-1][0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of tokens (B, 1 + N, C), or with `pre_logits` the input of the head."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

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
        """Features after the stages in `indices`; arguments as in timm's `VisionTransformer.forward_intermediates`.

        Only the last stage has a norm and a class token. The prefix tokens of the others have the shape (B, 0, C).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be NCHW or NLC")
        take, last = feature_take_indices(len(self.stages), indices)
        after = self._run_stages(x, last + 1 if stop_early else None)
        final = self.norm(after[-1][0]) if len(after) == len(self.stages) else after[-1][0]
        intermediates: list[Any] = []
        for i in take:
            tokens, grid_size = after[i]
            if norm and i == len(self.stages) - 1:
                tokens = final
            num_prefix_tokens = self.stages[i].num_prefix_tokens
            feature = tokens[:, num_prefix_tokens:]
            if output_fmt == "NCHW":
                feature = _to_map(feature, grid_size).contiguous()
            intermediates.append((feature, tokens[:, :num_prefix_tokens]) if return_prefix_tokens else feature)
        return intermediates if intermediates_only else (final, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features in `indices` do not need. Returns the indices, all counted from 0."""
        take, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()
        if last < len(self.stages) - 1:  # only the last stage has the class token
            self.register_parameter("cls_token", None)
            self.num_prefix_tokens = 0
            self.num_features = self.head_hidden_size = self.embed_dim = self.feature_info[last]["num_chs"]
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _to_map(x_BNC: Tensor, grid_size: Size) -> Tensor:
    """Tokens of a grid (H, W) as a channels-last map (B, C, H, W), a view."""
    return x_BNC.unflatten(1, grid_size).permute(0, 3, 1, 2)


register_model(
    ModelInfo(
        name="localvit_pvt_tiny",
        paper_name="LocalViT-PVT",
        family=LocalPVT,
        parameters=13_456_152,
        multiply_adds=1_978_493_952,
        file="localvit_pvt.pth",
        acc1=78.144,
        acc5=94.238,
        loss=1.058,
    )
)
register_model(
    ModelInfo(
        name="pvt_tiny",  # the baseline: no block is local
        paper_name="PVT-Tiny",
        family=LocalPVT,
        args={"local_blocks": ()},
        parameters=13_229_288,
        multiply_adds=1_932_911_616,
    )
)
