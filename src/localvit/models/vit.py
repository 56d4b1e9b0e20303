"""LocalViT on the plain vision transformer (ViT, DeiT): LocalViT-T, -S, their ablations, and a nano for small images.

arXiv 2104.05707, section 4 and Table 6: timm's VisionTransformer whose feed-forwards hold the locality module. Note
the head counts, which are the paper's and not DeiT's: LocalViT-T has 4, LocalViT-S has 8.
"""

from typing import Any

from timm.models import generate_default_cfgs
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from localvit.models.positions import PositionGrids
from localvit.models.registry import also_known_as, build, released_cfg
from localvit.surgery.blocks import BlockSelection
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.sites import local_sites


class LocalViT(VisionTransformer):
    """timm's VisionTransformer with locality in the feed-forward of the selected blocks.

    Takes images (B, in_chans, H, W) of any size that the patches divide; positions are resampled from `img_size`'s
    grid. Arguments are timm's and:

    Args:
        act, reduction, expand_ratio, depthwise, depthwise_first: see `localvit.Replace`;
            `expand_ratio` is `mlp_ratio` unless given.
        local_blocks: which blocks, from 1: None for all, "1-4", "9-12", any list; none of them is the plain ViT.

    Raises:
        ValueError: for ablation arguments that name nothing.
    """

    PUBLISHED_KEYS: tuple[tuple[str, str], ...] = ((r"\.mlp\.conv\.", ".conv.conv."),)

    def __init__(
        self,
        *args: Any,
        act: str | int = "hs+se",
        reduction: int = 4,
        expand_ratio: float | None = None,
        depthwise: bool = True,
        depthwise_first: bool = False,
        local_blocks: BlockSelection = None,
        mlp_ratio: float = 4.0,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(*args, mlp_ratio=mlp_ratio, dynamic_img_size=True, **factory, **kwargs)  # type: ignore[misc]
        locality = Replace(
            act=act,
            reduction=reduction,
            expand_ratio=mlp_ratio if expand_ratio is None else expand_ratio,
            depthwise=depthwise,
            depthwise_first=depthwise_first,
        )
        replace_feed_forwards(local_sites(self, local_blocks), lambda site: locality)

    def position_grids(self, img_size: tuple[int, int] | None = None) -> PositionGrids:
        """Grid and prefix tokens of the position embedding for images of `img_size`, the model's own by default."""
        grid_size = self.patch_embed.dynamic_feat_size(img_size) if img_size else self.patch_embed.grid_size
        return {"pos_embed": (grid_size, self.num_prefix_tokens)}


class LocalViTDistilled(LocalViT, VisionTransformerDistilled):
    """LocalViT with DeiT's distillation token, which locality leaves alone like the class token.

    The linearized bases make timm's distilled constructor run between LocalViT's and VisionTransformer's, so that its
    two prefix tokens are known when locality is added.
    """


def _localvit(variant: str, pretrained: bool, distilled: bool = False, **kwargs: Any) -> VisionTransformer:
    kwargs.setdefault("out_indices", 3)
    return build(LocalViTDistilled if distilled else LocalViT, variant, pretrained, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "localvit_tiny_mlp4_act3_r192.in1k": released_cfg("localvit_t.pth"),
        "localvit_tiny_mlp4_act3_r4.in1k": released_cfg("localvit_t_se4.pth"),
        "localvit_tiny_mlp6_act1.untrained": released_cfg(),
        "localvit_small_mlp4_act3_r384.in1k": released_cfg("localvit_s.pth"),
        "localvit_nano_patch4_32.untrained": released_cfg(input_size=(3, 32, 32), num_classes=10, crop_pct=1.0),
    }
)


@also_known_as("localvit_tiny")
def localvit_tiny_mlp4_act3_r192(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LocalViT-T: squeeze-and-excitation bottleneck 4 wide; 74.8 % on ImageNet-1k (README of the release)."""
    config = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 4, "reduction": 192}
    return _localvit("localvit_tiny_mlp4_act3_r192", pretrained, **config | kwargs)


@also_known_as("localvit_tiny_se4")
def localvit_tiny_mlp4_act3_r4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LocalViT-T-SE4: LocalViT-T with a bottleneck 192 wide; 75.7 % on ImageNet-1k."""
    config = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 4, "reduction": 4}
    return _localvit("localvit_tiny_mlp4_act3_r4", pretrained, **config | kwargs)


@also_known_as()
def localvit_tiny_mlp6_act1(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LocalViT-T with expand ratio 6, ReLU6 and no gate (an ablation; no weights were released)."""
    config = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 4, "mlp_ratio": 6.0}
    return _localvit("localvit_tiny_mlp6_act1", pretrained, **config | {"act": "relu6"} | kwargs)


@also_known_as("localvit_small")
def localvit_small_mlp4_act3_r384(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LocalViT-S: 80.8 % on ImageNet-1k."""
    config = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 8, "reduction": 384}
    return _localvit("localvit_small_mlp4_act3_r384", pretrained, **config | kwargs)


@also_known_as()
def localvit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A LocalViT for 32x32 images, of this package: small enough to train on two cores."""
    config = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "reduction": 96}
    return _localvit("localvit_nano_patch4_32", pretrained, **config | kwargs)
