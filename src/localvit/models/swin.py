"""LocalViT on Swin: timm's SwinTransformer whose feed-forwards hold the locality module.

arXiv 2104.05707, Table 6. The gate's reduction is a quarter of each stage's width; the head averages the tokens, so
every block's feed-forward counts. Swin's own drop path default, 0.1, stays.
"""

import inspect
from typing import Any

from timm.models import generate_default_cfgs
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from localvit.models.registry import also_known_as, build, released_cfg
from localvit.surgery.blocks import BlockSelection
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.sites import Site, local_sites


class LocalSwin(SwinTransformer):
    """timm's SwinTransformer with locality in the feed-forward of the selected blocks.

    Takes images (B, in_chans, H, W) of any size that the patches divide. Arguments are timm's and those of
    `LocalViT`; `reduction` is each stage's width // 4 unless given, and `local_blocks` counts through all stages.

    Raises:
        ValueError: for ablation arguments that name nothing.
    """

    PUBLISHED_KEYS = (
        (r"\.mlp\.conv\.", ".conv.conv."),
        # The published program merges patches at the end of a stage, timm at the start of the next.
        (r"^layers\.1\.downsample\.", "layers.0.downsample."),
        (r"^layers\.2\.downsample\.", "layers.1.downsample."),
        (r"^layers\.3\.downsample\.", "layers.2.downsample."),
        (r"^head\.fc\.", "head."),
    )

    def __init__(
        self,
        *args: Any,
        act: str | int = "hs+se",
        reduction: int | None = None,
        expand_ratio: float | None = None,
        depthwise: bool = True,
        depthwise_first: bool = False,
        local_blocks: BlockSelection = None,
        mlp_ratio: float = 4.0,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        unknown = kwargs.keys() - inspect.signature(SwinTransformer.__init__).parameters.keys()
        if unknown:  # timm before 1.0.30 takes and forgets them
            raise TypeError(f"LocalSwin takes no argument {', '.join(sorted(unknown))}")
        factory = {"device": device, "dtype": dtype}
        super().__init__(*args, mlp_ratio=mlp_ratio, strict_img_size=False, **factory, **kwargs)  # type: ignore[misc]

        def locality_of(site: Site) -> Replace:
            return Replace(
                act=act,
                reduction=site.dim // 4 if reduction is None else reduction,
                expand_ratio=mlp_ratio if expand_ratio is None else expand_ratio,
                depthwise=depthwise,
                depthwise_first=depthwise_first,
            )

        replace_feed_forwards(local_sites(self, local_blocks), locality_of)

    def no_weight_decay(self) -> set[str]:
        """No parameter: timm spares the relative position biases, the published training did not."""
        return set()

    def published_buffers(self) -> dict[str, Tensor]:
        """The entries of a published state dict that are computed: relative position indices and attention masks."""
        computed = {}
        for name, module in self.named_modules():
            if isinstance(module, SwinTransformerBlock):
                block: Any = module
                computed[f"{name}.attn.relative_position_index"] = block.attn.relative_position_index
                weight = block.norm1.weight
                mask = block.get_attn_mask(device=weight.device, dtype=weight.dtype)
                if mask is not None:
                    computed[f"{name}.attn_mask"] = mask
        return computed


default_cfgs = generate_default_cfgs(
    {
        "localvit_swin_tiny_patch4_window7_224.in1k": released_cfg(
            "localvit_swin.pth", pool_size=(7, 7), first_conv="patch_embed.proj", classifier="head.fc"
        )
    }
)


@also_known_as("localvit_swin_tiny")
def localvit_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalViT-Swin: 81.9 % on ImageNet-1k."""
    config = {"patch_size": 4, "window_size": 7, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return build(
        LocalSwin,
        "localvit_swin_tiny_patch4_window7_224",
        pretrained,
        **config | {"out_indices": (0, 1, 2, 3)} | kwargs,
    )
