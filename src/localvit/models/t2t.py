"""LocalViT on Tokens-to-Token ViT: timm's VisionTransformer after T2T's tokenizer, and the baseline itself.

T2T-ViT is arXiv 2101.11986, with the performer tokenizer of its section 3.1 (random features of arXiv 2009.14794,
section 2.3). LocalViT-T2T is arXiv 2104.05707, Table 6: every feed-forward is the locality module, including the two of
the tokenizer.

Shapes: B batch, N tokens (H x W), D token width, M random features.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from localvit.models import positions
from localvit.models.registry import ModelInfo, register_model
from localvit.models.vit import LocalViT
from localvit.surgery.blocks import BlockSelection, select_blocks
from localvit.surgery.hosts.timm_plain import in_order
from localvit.surgery.replace import Replace
from localvit.surgery.sites import Site, host
from localvit.tokens.grid import Grid, Size
from localvit.tokens.layouts import TokenSequence
from localvit.tokens.sources import InputMap, OutputMap, enclose_calls


@torch.fx.wrap  # It reads the dtype and the device type, which a graph tracer does not know.
def random_feature_attention(query_BND: Tensor, key_BND: Tensor, value_BND: Tensor, features_MD: Tensor) -> Tensor:
    """Softmax attention without the factor 1 / sqrt(D), approximated in linear time. Returns (B, N, D).

    The kernel exp(q.k) is the mean over the random features w of exp(w.q - |q|^2 / 2) exp(w.k - |k|^2 / 2), which are
    the positive features of arXiv 2009.14794, equation 7. These exponents exceed the range of half precision, so the
    sums are at least single precision. The 1e-8 in the denominator is the published one. It matters for long queries
    and keys.
    """
    kind = query_BND.device.type
    # The meta device, which has no values, has no autocast either. Asking torch would break the compiler's graph.
    with contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        precise = torch.promote_types(value_BND.dtype, torch.float32)
        query, key, value = query_BND.to(precise), key_BND.to(precise), value_BND.to(precise)
        features = features_MD.to(precise)

        def feature_map(x_BND: Tensor) -> Tensor:
            exponent_BNM = x_BND @ features.T - x_BND.square().sum(-1, keepdim=True) / 2
            return exponent_BNM.exp() / math.sqrt(features.shape[0])

        query_BNM, key_BNM = feature_map(query), feature_map(key)
        weight_BN1 = query_BNM @ key_BNM.sum(1)[:, :, None]
        mixed_BND = query_BNM @ (key_BNM.transpose(1, 2) @ value)
        return (mixed_BND / (weight_BN1 + 1e-8)).to(value_BND.dtype)


def _make_buffers(module: nn.Module, *names: str) -> None:
    """Make buffers of the same names of a module's parameters: a state dict has them, and nothing trains them."""
    for name in names:
        value = getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, value)


class TokenPerformer(nn.Module):
    """The transformer of a tokenizer stage: linear attention with one head, and a feed-forward as wide as its tokens.

    Maps (B, H, W, in_dim) to (B, H, W, dim). The attention changes the width, so the residual adds its values.

    Args:
        in_dim: width of the unfolded pixels or tokens.
        dim: width of the output tokens.
        locality: the module for the feed-forward; None for a plain feed-forward after a norm.
    """

    w: Tensor

    def __init__(self, in_dim: int, dim: int, locality: Replace | None, *, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.local = locality is not None
        self.register_buffer("w", torch.empty(dim // 2, dim, **factory))
        self.norm1 = nn.LayerNorm(in_dim, eps=1e-5, **factory)
        self.kqv = nn.Linear(in_dim, 3 * dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **factory)
        self.mlp: nn.Module
        if locality is None:
            self.mlp = nn.Sequential(nn.Linear(dim, dim, **factory), nn.GELU(), nn.Linear(dim, dim, **factory))
        else:
            grid = Grid()
            InputMap(self).connect(grid)
            enclose_calls(self, grid)
            self.mlp = locality.feed_forward(dim, TokenSequence(grid), **factory)
            _make_buffers(self.norm2, "weight", "bias")  # Not used with locality, but published state dicts have it.

    def init_weights(self) -> None:
        """Initialize the frozen random features: orthogonal, of length sqrt(M). timm's `init_weights` calls this."""
        features = nn.init.orthogonal_(torch.empty(self.w.shape, device=self.w.device))
        with torch.no_grad():
            self.w.copy_(features * math.sqrt(self.w.shape[0]))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        height, width = x_BHWD.shape[1:3]
        key, query, value = self.kqv(self.norm1(x_BHWD.flatten(1, 2))).chunk(3, dim=-1)
        x_BND = value + self.proj(random_feature_attention(query, key, value, self.w))
        x_BND = x_BND + self.mlp(x_BND if self.local else self.norm2(x_BND))
        return x_BND.unflatten(1, (height, width))


def soft_split(x_BHWD: Tensor, kernel_size: int, stride: int, grid_size: tuple[int, int]) -> Tensor:
    """Overlapping windows of a map as tokens: (B, H, W, D) to (B, *grid_size, D * kernel_size^2)."""
    windows = F.unfold(x_BHWD.permute(0, 3, 1, 2), kernel_size, padding=(kernel_size - stride + 1) // 2, stride=stride)
    return windows.transpose(1, 2).unflatten(1, grid_size)


class TokensToToken(PatchEmbed):
    """T2T's tokenizer as a patch embedding: (B, in_chans, 16 H, 16 W) to (B, H, W, embed_dim).

    Three overlapping splits of stride 4, 2 and 2, a `TokenPerformer` after each of the first two, and a projection.
    Its arguments are those of timm's PatchEmbed, and `locality` for the feed-forwards of both performers.

    Raises:
        ValueError: for a patch size other than 16, or an image whose size is not a multiple of 16.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        locality: Replace | None,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, **factory, **kwargs)
        if self.patch_size != (16, 16):
            raise ValueError(
                f"patch_size={patch_size} must be 16: the tokens-to-token splits make patches of 16 pixels"
            )
        positions.patch_grid(self.img_size, self.patch_size)
        token_dim = 64
        self.attention1 = TokenPerformer(in_chans * 7 * 7, token_dim, locality, **factory)
        self.attention2 = TokenPerformer(token_dim * 3 * 3, token_dim, locality, **factory)
        self.proj = nn.Linear(token_dim * 3 * 3, embed_dim, **factory)  # type: ignore[assignment]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        height, width = positions.patch_grid(image_BCHW.shape[-2:], self.patch_size)
        x_BHWD = self.attention1(soft_split(image_BCHW.permute(0, 2, 3, 1), 7, 4, (4 * height, 4 * width)))
        x_BHWD = self.attention2(soft_split(x_BHWD, 3, 2, (2 * height, 2 * width)))
        return self.proj(soft_split(x_BHWD, 3, 2, (height, width)))


def sinusoid(num_tokens: int, dim: int, device: torch.device) -> Tensor:
    """Position embedding (1, num_tokens, dim) of arXiv 1706.03762, section 3.5, in double precision."""
    position_N1 = torch.arange(num_tokens, dtype=torch.float64, device=device)[:, None]
    frequency_D = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle_ND = position_N1 * frequency_D
    return torch.stack((angle_ND.sin(), angle_ND.cos()), dim=-1).flatten(1)[None]


class LocalT2T(LocalViT):
    """T2T-ViT with locality in the feed-forward of the selected blocks, and in the tokenizer if any block has it.

    Its arguments are those of `LocalViT`. The module in the tokenizer always has `expand_ratio` 1 and act `hs`, while
    `depthwise` and `depthwise_first` apply to all modules. The position embedding is sinusoidal and a buffer.

    Raises:
        ValueError: for a value of these arguments that does not exist, or an image whose size is not a multiple of 16.
        TypeError: for `embed_layer`.
    """

    timm_cfg = MappingProxyType({"first_conv": ()})
    published_keys = (
        (r"^patch_embed\.proj\.", "tokens_to_token.project."),
        (r"^patch_embed\.(attention\d)\.mlp\.conv\.", r"tokens_to_token.\1.conv.conv."),
        (r"^patch_embed\.", "tokens_to_token."),
        (r"^(blocks\.\d+)\.mlp\.conv\.", r"\1.conv.conv."),
    )

    pos_embed: Any  # a parameter while timm's constructor runs, then a buffer

    def __init__(
        self,
        *args: Any,
        depth: int = 7,
        depthwise: bool = True,
        depthwise_first: bool = False,
        local_blocks: BlockSelection = None,
        dynamic_img_size: bool = True,
        **kwargs: Any,
    ) -> None:
        if "embed_layer" in kwargs:
            raise TypeError("LocalT2T has no argument embed_layer: its patch embedding is the tokens-to-token module")
        if not dynamic_img_size:
            raise ValueError("dynamic_img_size=False is not possible: LocalT2T takes images of any multiple of 16")
        ablation = {"depthwise": depthwise, "depthwise_first": depthwise_first}
        local = bool(select_blocks(local_blocks, depth))
        locality = Replace(act="hs", expand_ratio=1.0, **ablation) if local else None
        super().__init__(
            *args,
            depth=depth,
            local_blocks=local_blocks,
            embed_layer=partial(TokensToToken, locality=locality),
            **ablation,
            **kwargs,
        )
        _make_buffers(self, "pos_embed")

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        super().init_weights(*args, **kwargs)
        _, num_tokens, dim = self.pos_embed.shape
        with torch.no_grad():
            self.pos_embed.copy_(sinusoid(num_tokens, dim, self.pos_embed.device))

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """timm's `set_input_size`, with the position embedding still a buffer afterwards."""
        embed = self.patch_embed
        positions.check_patch_size(self, patch_size, embed.patch_size)
        img_size = positions.height_and_width(img_size or embed.img_size)
        positions.patch_grid(img_size, embed.patch_size)
        super().set_input_size(img_size)
        _make_buffers(self, "pos_embed")

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay."""
        return {"cls_token"}


@host(f"{__name__}.LocalT2T")
def _sites(model: LocalT2T) -> Iterator[Site]:
    """The feed-forwards of the blocks, not those of the tokenizer."""
    return in_order(model, "blocks", OutputMap(model.patch_embed, height_dim=1), model.num_prefix_tokens)


_SEVEN: dict[str, Any] = {
    "embed_dim": 256,
    "depth": 7,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "qkv_bias": False,
    "reduction": 128,
}
_SEVEN |= {"norm_layer": partial(nn.LayerNorm, eps=1e-5)}

register_model(
    ModelInfo(
        name="localvit_T2t_conv7",
        alias="localvit_t2t_7",
        paper_name="LocalViT-T2T",
        family=LocalT2T,
        args=_SEVEN,
        parameters=4_330_602,
        multiply_adds=1_153_637_376,
    )
)
register_model(
    ModelInfo(
        name="T2t_vit_7",  # the baseline: nothing is local
        alias="t2t_vit_7",
        paper_name="T2T-ViT-7",
        family=LocalT2T,
        args=_SEVEN | {"local_blocks": ()},
        parameters=4_255_694,
        multiply_adds=1_146_863_616,
    )
)
