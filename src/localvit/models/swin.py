"""LocalViT on Swin: timm's SwinTransformer with the locality module as its feed-forward.

arXiv 2104.05707, Table 6. The gate's reduction is a quarter of each stage's width. The head averages the tokens, so
every block's feed-forward has an effect. The default drop path rate is timm's, 0.1.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition
from torch import Tensor, nn

from localvit.models.family import Family
from localvit.models.registry import ModelInfo, register_model
from localvit.surgery.blocks import BlockSelection
from localvit.surgery.replace import Replace, replace_feed_forwards
from localvit.surgery.sites import Site, local_sites
from localvit.utils.exporting import is_exporting


@torch.fx.wrap  # It assigns to parts of a map, which a graph tracer cannot follow.
def shifted_window_mask(map_BHWC: Tensor, window_size: tuple[int, int], shift_size: tuple[int, int]) -> Tensor:
    """The mask (windows, N, N) of the attention between the N tokens of shifted windows: -100 between regions.

    The shift brings opposite sides of the map into one window; those regions must not see each other (arXiv 2103.14030,
    section 3.2).
    """
    regions = map_BHWC.new_zeros(1, *map_BHWC.shape[1:3], 1)
    for dim, (window, shift) in enumerate(zip(window_size, shift_size, strict=True), start=1):
        index = torch.arange(regions.shape[dim], device=regions.device)
        region = (index >= regions.shape[dim] - window).to(regions) + (index >= regions.shape[dim] - shift).to(regions)
        regions = 3 * regions + region.view(*(-1 if axis == dim else 1 for axis in range(4)))
    windows = window_partition(regions, window_size).flatten(1)
    return torch.where(windows[:, :, None] == windows[:, None, :], 0.0, -100.0).to(map_BHWC)


def _attention_mask(block: Any, x: Tensor | None = None, **factory: Any) -> Tensor | None:
    """`SwinTransformerBlock.get_attn_mask`, traceable for the map `x` of a forward."""
    if x is None or not any(block.shift_size):
        return type(block).get_attn_mask(block, **factory)
    return shifted_window_mask(x, block.window_size, block.shift_size)


def window_attention(block: Any, x_BHWC: Tensor) -> Tensor:
    """The block's attention in shifted windows, as timm computes it, of a map whose size torch.export leaves open.

    timm pads by `(window - H % window) % window` and divides the padded sides again, so that torch.export compares
    nested remainders for hours. Here the number of windows comes first, and all other sizes are products of it.
    """
    B, H, W, C = x_BHWC.shape
    (height, width), (down, right) = block.window_size, block.shift_size
    rows, columns = (H + height - 1) // height, (W + width - 1) // width
    shifted = torch.roll(x_BHWC, (-down, -right), (1, 2)) if down or right else x_BHWC
    padded = F.pad(shifted, (0, 0, 0, columns * width - W, 0, rows * height - H))
    windows = padded.view(B, rows, height, columns, width, C).transpose(2, 3)
    attended = block.attn(windows.reshape(B * rows * columns, height * width, C), mask=block.get_attn_mask(padded))
    windows = attended.view(B, rows, columns, height, width, C).transpose(2, 3)
    whole = windows.reshape(B, rows * height, columns * width, C)
    for dim, (side, shift) in enumerate(((H, down), (W, right)), start=1):
        # Cropped and shifted back by index: after a slice, torch.export would ask whether the map is contiguous.
        kept = torch.arange(side, device=whole.device)
        whole = whole.index_select(dim, kept.roll(shift) if shift else kept)
    return whole


@contextmanager
def _size_left_open(model: nn.Module) -> Iterator[None]:
    """Blocks whose attention is `window_attention`, while torch.export traces.

    Only then, because a `partial` holds its own block: replicas of DataParallel would share the first one's weights.
    """
    blocks: list[Any] = [
        block for block in model.modules() if isinstance(block, SwinTransformerBlock) and block.dynamic_mask
    ]
    for block in blocks:
        block._attn = partial(window_attention, block)
    try:
        yield
    finally:
        for block in blocks:
            del block._attn


class LocalSwin(Family, SwinTransformer):
    """timm's SwinTransformer with locality in the feed-forward of the selected blocks.

    Takes images (B, in_chans, H, W) of any size that the patches divide, unless `dynamic_img_size` is False. Its
    arguments are timm's and those of `LocalViT`. `reduction` is each stage's width // 4 unless given, and
    `local_blocks` counts through all stages.

    Raises:
        ValueError: for a value of these arguments that does not exist.
    """

    timm_cfg = MappingProxyType({"pool_size": (7, 7), "classifier": "head.fc"})
    out_indices = (0, 1, 2, 3)
    published_keys = (
        (r"\.mlp\.conv\.", ".conv.conv."),
        # The published program merges patches at the end of a stage, timm at the start of the next one.
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
        dynamic_img_size: bool = True,
        strict_img_size: bool | None = None,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        unknown = kwargs.keys() - inspect.signature(SwinTransformer.__init__).parameters.keys()
        if unknown:  # timm before 1.0.30 ignores them
            raise TypeError(f"LocalSwin has no argument {', '.join(sorted(unknown))}")
        factory = {"device": device, "dtype": dtype}
        strict = not dynamic_img_size if strict_img_size is None else strict_img_size
        super().__init__(*args, mlp_ratio=mlp_ratio, strict_img_size=strict, **factory, **kwargs)  # type: ignore[misc]
        for block in self.modules():
            if isinstance(block, SwinTransformerBlock):
                block.get_attn_mask = partial(_attention_mask, block)  # type: ignore[method-assign]

        def locality_of(site: Site) -> Replace:
            return Replace(
                act=act,
                reduction=site.dim // 4 if reduction is None else reduction,
                expand_ratio=mlp_ratio if expand_ratio is None else expand_ratio,
                depthwise=depthwise,
                depthwise_first=depthwise_first,
            )

        replace_feed_forwards(local_sites(self, local_blocks), locality_of)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalized map (B, H, W, C) of the last stage, of images (B, in_chans, H, W)."""
        with _size_left_open(self) if is_exporting() else nullcontext():
            return super().forward_features(x)

    def no_weight_decay(self) -> set[str]:
        """No parameter. timm has no weight decay on relative position biases; the published training had."""
        return set()

    def published_buffers(self) -> dict[str, Tensor]:
        """Relative position indices and attention masks, which the published program stores."""
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


register_model(
    ModelInfo(
        name="localvit_swin_tiny_patch4_window7_224",
        alias="localvit_swin_tiny",
        paper_name="LocalViT-Swin",
        family=LocalSwin,
        args={"patch_size": 4, "window_size": 7, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
        parameters=29_079_010,
        multiply_adds=4_542_612_480,
        file="localvit_swin.pth",
        acc1=81.86,
        acc5=95.72,
        loss=1.109,
    )
)
