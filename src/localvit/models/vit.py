"""LocalViT on the plain vision transformer (ViT, DeiT): LocalViT-T, LocalViT-S, and a small one for small images.

arXiv 2104.05707, section 4 and Table 6: timm's VisionTransformer with the locality module as its feed-forward. The
numbers of heads are the paper's, not DeiT's: 4 in LocalViT-T and 8 in LocalViT-S.
"""

from typing import Any, ClassVar

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from localvit.models.family import Family, PositionGrids
from localvit.models.packaged import PackagedWeights
from localvit.models.registry import ModelInfo, register_model
from localvit.surgery.blocks import BlockSelection
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.sites import local_sites


class LocalViT(Family, VisionTransformer):
    """timm's VisionTransformer with locality in the feed-forward of the selected blocks.

    Takes images (B, in_chans, H, W) of any size that the patches divide, unless `dynamic_img_size` is False. The
    position embeddings are resampled from the grid of `img_size`. Its arguments are timm's and:

    Args:
        act, reduction, expand_ratio, depthwise, depthwise_first: see `localvit.Replace`;
            `expand_ratio` is `mlp_ratio` unless given.
        local_blocks: which blocks, counted from 1: None for all, "1-4", "9-12", or any list of numbers. With an empty
            list the model is the plain ViT.

    Raises:
        ValueError: for a value of these arguments that does not exist.
    """

    published_keys: ClassVar[tuple[tuple[str, str], ...]] = ((r"\.mlp\.conv\.", ".conv.conv."),)

    @classmethod
    def create(cls, distilled: bool = False, **kwargs: Any) -> "LocalViT":
        """The model, with DeiT's distillation token if `distilled`."""
        if distilled and cls is not LocalViT:
            raise TypeError(f"{cls.__name__} has no argument distilled")
        return (LocalViTDistilled if distilled else cls)(**kwargs)

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
        dynamic_img_size: bool = True,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        kwargs |= {"mlp_ratio": mlp_ratio, "dynamic_img_size": dynamic_img_size, "device": device, "dtype": dtype}
        super().__init__(*args, **kwargs)
        locality = Replace(
            act=act,
            reduction=reduction,
            expand_ratio=mlp_ratio if expand_ratio is None else expand_ratio,
            depthwise=depthwise,
            depthwise_first=depthwise_first,
        )
        replace_feed_forwards(local_sites(self, local_blocks), lambda site: locality)

    def position_grids(self, img_size: tuple[int, int] | None = None) -> PositionGrids:
        if self.pos_embed is None:
            return {}
        grid_size = self.patch_embed.dynamic_feat_size(img_size) if img_size else self.patch_embed.grid_size
        return {"pos_embed": (grid_size, 0 if self.no_embed_class else self.num_prefix_tokens)}


class LocalViTDistilled(LocalViT, VisionTransformerDistilled):
    """LocalViT with DeiT's distillation token. Like the class token, it does not take part in the convolution.

    In the method resolution order timm's distilled class comes between LocalViT and VisionTransformer, so that both
    prefix tokens exist when locality is added.
    """


_TINY = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 4}

register_model(
    ModelInfo(
        name="localvit_tiny_mlp4_act3_r192",
        alias="localvit_tiny",
        paper_name="LocalViT-T",
        family=LocalViT,
        args=_TINY | {"reduction": 192},
        parameters=5_908_696,
        multiply_adds=1_266_475_008,
        file="localvit_t.pth",
        acc1=74.838,
        acc5=92.610,
        loss=1.211,
    )
)
register_model(
    ModelInfo(
        name="localvit_tiny_mlp4_act3_r4",
        alias="localvit_tiny_se4",
        paper_name="LocalViT-T-SE4",
        family=LocalViT,
        args=_TINY | {"reduction": 4},
        parameters=9_376_168,
        multiply_adds=1_269_940_224,
        file="localvit_t_se4.pth",
        acc1=75.738,
        acc5=93.048,
        loss=1.330,
    )
)
register_model(
    ModelInfo(
        name="localvit_tiny_mlp6_act1",
        paper_name="LocalViT-T, ReLU6, ratio 6",
        family=LocalViT,
        args=_TINY | {"mlp_ratio": 6.0, "act": "relu6"},
        parameters=7_655_080,
        multiply_adds=1_621_346_304,
    )
)
register_model(
    ModelInfo(
        name="localvit_small_mlp4_act3_r384",
        alias="localvit_small",
        paper_name="LocalViT-S",
        family=LocalViT,
        args={"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 8, "reduction": 384},
        parameters=22_433_176,
        multiply_adds=4_617_388_032,
        file="localvit_s.pth",
        acc1=80.780,
        acc5=95.376,
        loss=1.019,
    )
)
register_model(
    ModelInfo(
        name="localvit_nano_patch4_32",  # of this package: small enough to train on two CPU cores
        family=LocalViT,
        args={"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "reduction": 96},
        parameters=731_074,
        multiply_adds=49_197_120,
        input_size=(3, 32, 32),
        num_classes=10,
        crop_pct=1.0,
        packaged=PackagedWeights(
            tag="cifar10",
            file="localvit_nano_patch4_32.cifar10.safetensors",
            class_names=(*("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),),
            data_set="CIFAR-10",
            num_images=10_000,
            acc1=87.37,
            acc5=99.43,
            loss=0.448,
            source="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        ),
    )
)
