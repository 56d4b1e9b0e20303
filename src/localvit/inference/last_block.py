"""A model's last block where the head reads the prefix tokens alone (class, distillation): no work for the others.

The patches' queries, output projections and feed-forward reach nothing there: they run for the prefix tokens only, and
locality, which does not act on those, not at all. Keys and values are still every token's.

Shapes: B batch, N tokens, P prefix tokens, C channels, M attention heads, D channels of a head.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch.nn.functional as F
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models import pvt_v2, tnt
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from localvit.models.pvt import LocalPVT
from localvit.models.pvt_stage import Block as PyramidBlock
from localvit.models.tnt import LocalTNT
from localvit.ops.stages import is_untouched
from localvit.surgery.branch import LocalityBranch, detach, has_branch
from localvit.tokens.mlp import FusedMlp


class LastBlock(nn.Module):
    """A pre-norm block that, while the whole model runs, computes the prefix tokens alone.

    Takes what the block takes; tokens (B, N, C) become (B, P, C) then, and (B, N, C) when it is called by itself.
    """

    norm1, attn, norm2 = "norm1", "attn", "norm2"
    """The block's names for its attention and for the norms before that and before the feed-forward."""
    attention: type[nn.Module] = Attention
    """The class of that attention, exactly."""

    def __init__(self, block: Any, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block = block
        self.num_prefix_tokens = num_prefix_tokens
        self.for_logits = False
        # That of the prefix tokens; the paper's form does not act on them.
        self.mlp = None if isinstance(block.mlp, FusedMlp) else _without_branch(block.mlp)

    def begin(self, model: Any, args: tuple) -> None:
        """The whole model begins: nothing but its logits is wanted, unless its head has come to read all tokens."""
        self.for_logits = model.global_pool == "token"

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        """The whole model is done."""
        self.for_logits = False

    def forward(self, x_BNC: Tensor, *args: Any, **kwargs: Any) -> Any:
        masked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        if masked or not self.for_logits:
            return self.block(x_BNC, *args, **kwargs)
        return self.prefix_tokens(x_BNC)

    def prefix_tokens(self, x_BNC: Tensor) -> Tensor:
        """The block's prefix tokens (B, P, C)."""
        norm1, attn, norm2 = (getattr(self.block, name) for name in (self.norm1, self.attn, self.norm2))
        scale1, scale2 = (getattr(self.block, name, nn.Identity()) for name in ("ls1", "ls2"))
        x_BPC = x_BNC[:, : self.num_prefix_tokens] + scale1(self.attend(attn, norm1(x_BNC)))
        return x_BPC if self.mlp is None else x_BPC + scale2(self.mlp(norm2(x_BPC)))

    def attend(self, attn: Any, y_BNC: Tensor) -> Tensor:
        """What timm's `Attention` gives to the prefix tokens."""
        y_BPC = y_BNC[:, : self.num_prefix_tokens]
        dim = attn.num_heads * attn.head_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        query = F.linear(y_BPC, weight[:dim], None if bias is None else bias[:dim])
        key, value = F.linear(y_BNC, weight[dim:], None if bias is None else bias[dim:]).chunk(2, dim=-1)
        query_BMPD, key_BMND, value_BMND = _split_heads(attn.num_heads, query, key, value)
        out_BMPD = F.scaled_dot_product_attention(attn.q_norm(query_BMPD), attn.k_norm(key_BMND), value_BMND)
        out_BPC = attn.norm(out_BMPD.transpose(1, 2).flatten(2))
        if getattr(attn, "gate", None) is not None:
            out_BPC = out_BPC * attn.gate(y_BPC).sigmoid()
        return attn.proj(out_BPC)


class LastPyramidBlock(LastBlock):
    """PVT's last block, which is told its tokens' grid and has apart what makes queries, and keys and values."""

    attention = pvt_v2.Attention

    def forward(self, x_BNC: Tensor, grid_size: tuple[int, int]) -> Any:  # type: ignore[override]
        return self.prefix_tokens(x_BNC) if self.for_logits else self.block(x_BNC, grid_size)

    def attend(self, attn: Any, y_BNC: Tensor) -> Tensor:
        """What PVT's attention, without spatial reduction, gives to the prefix tokens."""
        query, (key, value) = attn.q(y_BNC[:, : self.num_prefix_tokens]), attn.kv(y_BNC).chunk(2, dim=-1)
        query_BMPD, key_BMND, value_BMND = _split_heads(attn.num_heads, query, key, value)
        out_BMPD = F.scaled_dot_product_attention(query_BMPD, key_BMND, value_BMND)
        return attn.proj(out_BMPD.transpose(1, 2).flatten(2))


class LastOuterBlock(LastBlock):
    """TNT's last block. Its inner transformer runs whole: what it finds in the pixels is in the keys and values."""

    norm1, attn, norm2 = "norm_out", "attn_out", "norm_mlp"

    def __init__(self, block: Any, num_prefix_tokens: int) -> None:
        super().__init__(block, num_prefix_tokens)
        silent = {"norm_out": nn.Identity(), "attn_out": _Nothing(), "norm_mlp": nn.Identity(), "mlp": _Nothing()}
        self.inner = copy.copy(block)  # the same modules otherwise
        self.inner._modules = block._modules | silent

    def forward(self, pixels: Tensor, x_BNC: Tensor) -> Any:  # type: ignore[override]
        if not self.for_logits:
            return self.block(pixels, x_BNC)
        pixels, x_BNC = self.inner(pixels, x_BNC)
        return pixels, self.prefix_tokens(x_BNC)


class _Nothing(nn.Module):
    """A part of a block that adds nothing to its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _split_heads(num_heads: int, *parts_BNC: Tensor) -> list[Tensor]:
    return [part_BNC.unflatten(2, (num_heads, -1)).transpose(1, 2) for part_BNC in parts_BNC]


_FEED_FORWARDS = (FusedMlp, Mlp, GluMlp, SwiGLU)
"""Those that do not mix tokens, but for locality."""


@dataclass(frozen=True, kw_only=True)
class PrefixReader:
    """A class of models whose head, with `global_pool="token"`, reads the last block's prefix tokens alone."""

    block: type[nn.Module]
    """The class of that block, exactly: another one computes something else."""
    shortened: type[LastBlock] = LastBlock
    """What takes its place."""
    blocks: Callable[[Any], Any] = attrgetter("blocks")
    """The list, in the model, that it is the last of."""


PREFIX_READERS: dict[type[nn.Module], PrefixReader] = {
    VisionTransformer: PrefixReader(block=Block),
    VisionTransformerDistilled: PrefixReader(block=Block),
    tnt.TNT: PrefixReader(block=tnt.Block, shortened=LastOuterBlock),
    LocalTNT: PrefixReader(block=tnt.Block, shortened=LastOuterBlock),
    LocalPVT: PrefixReader(
        block=PyramidBlock, shortened=LastPyramidBlock, blocks=lambda model: model.stages[-1].blocks
    ),
}
"""A row holds for subclasses too, as long as they leave all of `FORWARDS` alone."""
FORWARDS = ("forward", "forward_features", "forward_head", "pool")
"""The methods that a model goes through from its images to its logits."""


def shorten_last_block(model: nn.Module) -> None:
    """Put a `LastBlock` where a model's last block is, if no more than prefix tokens is read of it; else do nothing."""
    own: Any = model
    reader = next((reader for cls, reader in PREFIX_READERS.items() if _runs_as(own, cls)), None)
    if reader is None or own.global_pool != "token":
        return
    blocks = reader.blocks(own)
    if len(blocks) and _is_known(blocks[-1], reader, own.num_prefix_tokens):
        blocks[-1] = last = reader.shortened(blocks[-1], own.num_prefix_tokens)
        own.register_forward_pre_hook(last.begin)
        own.register_forward_hook(last.end, always_call=True)


def _runs_as(model: nn.Module, cls: type[nn.Module]) -> bool:
    same = (getattr(type(model), name, None) is getattr(cls, name, None) for name in FORWARDS)
    return isinstance(model, cls) and all(same)


def _is_known(block: Any, reader: PrefixReader, num_prefix_tokens: int) -> bool:
    """Whether the block's parts, run for the prefix tokens, give what it gives to them."""
    attn: Any = getattr(block, reader.shortened.attn, None)
    kinds = type(block) is reader.block and type(attn) is reader.shortened.attention
    if not kinds or type(block.mlp) not in _FEED_FORWARDS:
        return False
    if getattr(attn, "sr", None) is not None or type(getattr(attn, "qkv", None)) not in (nn.Linear, type(None)):
        return False  # Keys of a reduced map, or a projection whose weight is not all of it.
    if not all(map(is_untouched, (block, *attn.modules()))):
        return False
    local = [module.layout for module in block.modules() if isinstance(module, LocalityBranch | FusedMlp)]
    return all(getattr(layout, "num_prefix_tokens", 0) == num_prefix_tokens for layout in local)


def _without_branch(mlp: nn.Module) -> nn.Module:
    """The feed-forward without its branch: itself where it has none, else a copy."""
    hosts = [name for name, module in mlp.named_modules() if has_branch(module)]
    if not hosts:
        return mlp
    plain = copy.deepcopy(mlp)
    for name in hosts:
        detach(plain.get_submodule(name))
    return plain
