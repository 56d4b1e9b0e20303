"""A pre-norm block's prefix tokens (class, distillation) by themselves, which the head of many models reads only.

Nothing in the block depends on the queries, output projections and feed-forward of the patches, so these run for the
prefix tokens only. Keys and values are computed for every token.

Shapes: B batch, N tokens, P prefix tokens, C channels, M attention heads, D channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from timm.layers import Attention
from timm.models import pvt_v2, tnt
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from localvit.models.pvt_stage import Block as PyramidBlock
from localvit.tokens.mlp import FusedMlp


def prefix_tokens(block: Any, x_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
    """The block's prefix tokens (B, P, C)."""
    parts = BLOCKS[type(block)]
    norm1, attn, norm2 = (getattr(block, name) for name in (parts.norm1, parts.attn, parts.norm2))
    added_BPC = parts.attend(attn, norm1(x_BNC), num_prefix_tokens)
    x_BPC = x_BNC[:, :num_prefix_tokens] + _through(block, parts.after_attn, added_BPC)
    if isinstance(block.mlp, FusedMlp):  # The paper's module adds zero to prefix tokens.
        return x_BPC
    return x_BPC + _through(block, parts.after_mlp, block.mlp(norm2(x_BPC)))


def _through(block: nn.Module, names: tuple[str, ...], x_BPC: Tensor) -> Tensor:
    for name in names:
        x_BPC = getattr(block, name)(x_BPC)
    return x_BPC


def _attend(attn: Any, y_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
    """The output of timm's `Attention` for the prefix tokens."""
    y_BPC = y_BNC[:, :num_prefix_tokens]
    dim = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    query = F.linear(y_BPC, weight[:dim], None if bias is None else bias[:dim])
    key, value = F.linear(y_BNC, weight[dim:], None if bias is None else bias[dim:]).chunk(2, dim=-1)
    query_BMPD, key_BMND, value_BMND = _split_heads(attn.num_heads, query, key, value)
    out_BMPD = F.scaled_dot_product_attention(attn.q_norm(query_BMPD), attn.k_norm(key_BMND), value_BMND)
    out_BPC = attn.norm(out_BMPD.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        out_BPC = out_BPC * attn.gate(y_BPC).sigmoid()
    return attn.proj_drop(attn.proj(out_BPC))


def _attend_in_pyramid(attn: Any, y_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
    """The output of PVT's attention, without spatial reduction, for the prefix tokens."""
    query, (key, value) = attn.q(y_BNC[:, :num_prefix_tokens]), attn.kv(y_BNC).chunk(2, dim=-1)
    query_BMPD, key_BMND, value_BMND = _split_heads(attn.num_heads, query, key, value)
    out_BMPD = F.scaled_dot_product_attention(query_BMPD, key_BMND, value_BMND)
    return attn.proj_drop(attn.proj(out_BMPD.transpose(1, 2).flatten(2)))


def _split_heads(num_heads: int, *parts_BNC: Tensor) -> list[Tensor]:
    return [part_BNC.unflatten(2, (num_heads, -1)).transpose(1, 2) for part_BNC in parts_BNC]


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """The parts of a class of pre-norm blocks that the prefix tokens pass through."""

    attention: type[nn.Module]
    """The exact class of its attention."""
    attend: Callable[[Any, Tensor, int], Tensor]
    """Returns that attention's output for the prefix tokens, given all tokens."""
    norm1: str
    attn: str
    norm2: str
    """Attribute names of the attention and of the norms before attention and feed-forward."""
    after_attn: tuple[str, ...]
    after_mlp: tuple[str, ...]
    """Names of the modules that their outputs pass before they are added."""


_NAMES: Any = {"norm1": "norm1", "attn": "attn", "norm2": "norm2"}
_OUTER_NAMES: Any = {"norm1": "norm_out", "attn": "attn_out", "norm2": "norm_mlp"}
BLOCKS: dict[type[nn.Module], BlockParts] = {
    Block: BlockParts(
        **_NAMES,
        attention=Attention,
        attend=_attend,
        after_attn=("ls1", "drop_path1"),
        after_mlp=("ls2", "drop_path2"),
    ),
    PyramidBlock: BlockParts(
        **_NAMES,
        attention=pvt_v2.Attention,
        attend=_attend_in_pyramid,
        after_attn=("drop_path1",),
        after_mlp=("drop_path2",),
    ),
    tnt.Block: BlockParts(
        **_OUTER_NAMES,
        attention=Attention,  # `localvit.inference.fusion` has put it there.
        attend=_attend,
        after_attn=("drop_path",),
        after_mlp=("drop_path",),
    ),
}
"""Exact classes of last blocks that are shortened."""
