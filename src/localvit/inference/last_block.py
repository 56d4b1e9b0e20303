"""The last block of a model whose head reads the prefix tokens only (class, distillation): no work for the patches.

In such a block nothing depends on the queries, output projections and feed-forward of the patches: these run for the
prefix tokens only. Locality, which does not act on prefix tokens, does not run. Keys and values are computed for every
token.

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
from localvit.surgery.override import override_forward
from localvit.surgery.projection import LocalizedProjection, localized_projections, remove_locality
from localvit.tokens.mlp import FusedMlp
from localvit.tokens.per_call import PerCall


class LastBlock(nn.Module):
    """A pre-norm block that computes the prefix tokens only while the whole model runs.

    It has the arguments of the block. Tokens (B, N, C) become (B, P, C) in a call of the model, and (B, N, C) in any
    other call.
    """

    norm1, attn, norm2 = "norm1", "attn", "norm2"
    """Attribute names, in the block, of its attention and of the norms before attention and feed-forward."""
    attention: type[nn.Module] = Attention
    """The exact class of that attention."""

    def __init__(self, block: Any, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block = block
        self.num_prefix_tokens = num_prefix_tokens
        self.calls = PerCall()
        # That of the prefix tokens, on which the paper's module does not act.
        self.mlp = None if isinstance(block.mlp, FusedMlp) else _without_adapter(block.mlp)

    @property
    def for_logits(self) -> bool:
        """Whether a call of the whole model is in progress, whose head reads the prefix tokens only."""
        return bool(self.calls.value)

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
        """The output of timm's `Attention` for the prefix tokens."""
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
    """PVT's last block, which is given the grid, and has one projection for queries and one for keys and values."""

    attention = pvt_v2.Attention

    def forward(self, x_BNC: Tensor, grid_size: tuple[int, int]) -> Any:  # type: ignore[override]
        return self.prefix_tokens(x_BNC) if self.for_logits else self.block(x_BNC, grid_size)

    def attend(self, attn: Any, y_BNC: Tensor) -> Tensor:
        """The output of PVT's attention, without spatial reduction, for the prefix tokens."""
        query, (key, value) = attn.q(y_BNC[:, : self.num_prefix_tokens]), attn.kv(y_BNC).chunk(2, dim=-1)
        query_BMPD, key_BMND, value_BMND = _split_heads(attn.num_heads, query, key, value)
        out_BMPD = F.scaled_dot_product_attention(query_BMPD, key_BMND, value_BMND)
        return attn.proj(out_BMPD.transpose(1, 2).flatten(2))


class LastOuterBlock(LastBlock):
    """TNT's last block. Its inner transformer runs for all patches: the keys and values depend on it."""

    norm1, attn, norm2 = "norm_out", "attn_out", "norm_mlp"

    def __init__(self, block: Any, num_prefix_tokens: int) -> None:
        super().__init__(block, num_prefix_tokens)
        outer = {"norm_out": nn.Identity(), "attn_out": _Zero(), "norm_mlp": nn.Identity(), "mlp": _Zero()}
        self.inner = copy.copy(block)  # It shares the other modules.
        self.inner._modules = block._modules | outer

    def forward(self, pixels: Tensor, x_BNC: Tensor) -> Any:  # type: ignore[override]
        if not self.for_logits:
            return self.block(pixels, x_BNC)
        pixels, x_BNC = self.inner(pixels, x_BNC)
        return pixels, self.prefix_tokens(x_BNC)


class _Zero(nn.Module):
    """A part of a block that adds zero to its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _split_heads(num_heads: int, *parts_BNC: Tensor) -> list[Tensor]:
    return [part_BNC.unflatten(2, (num_heads, -1)).transpose(1, 2) for part_BNC in parts_BNC]


_FEED_FORWARDS = (FusedMlp, Mlp, GluMlp, SwiGLU)
"""Feed-forwards that do not mix tokens, apart from locality."""


@dataclass(frozen=True, kw_only=True)
class PrefixReader:
    """A class of models whose head, with `global_pool="token"`, reads only the prefix tokens of the last block."""

    block: type[nn.Module]
    """The exact class of that block: a subclass may compute something else."""
    shortened: type[LastBlock] = LastBlock
    """The class that replaces it."""
    blocks: Callable[[Any], Any] = attrgetter("blocks")
    """Returns the model's list of blocks, whose last one it is."""


PREFIX_READERS: dict[type[nn.Module], PrefixReader] = {
    VisionTransformer: PrefixReader(block=Block),
    VisionTransformerDistilled: PrefixReader(block=Block),
    tnt.TNT: PrefixReader(block=tnt.Block, shortened=LastOuterBlock),
    LocalTNT: PrefixReader(block=tnt.Block, shortened=LastOuterBlock),
    LocalPVT: PrefixReader(
        block=PyramidBlock, shortened=LastPyramidBlock, blocks=lambda model: model.stages[-1].blocks
    ),
}
"""Subclasses are included as long as they override none of `FORWARDS`."""
FORWARDS = ("forward", "forward_features", "forward_head", "pool")
"""The methods that a model calls from its images to its logits."""


def shorten_last_block(model: nn.Module) -> None:
    """Replace a model's last block, in place, by a `LastBlock` if the head reads its prefix tokens only."""
    own: Any = model
    reader = next((reader for cls, reader in PREFIX_READERS.items() if _runs_as(own, cls)), None)
    if reader is None or own.global_pool != "token":
        return
    blocks = reader.blocks(own)
    if len(blocks) and _is_known(blocks[-1], reader, own.num_prefix_tokens):
        blocks[-1] = last = reader.shortened(blocks[-1], own.num_prefix_tokens)
        override_forward(own, _forward_for_logits, last)


# torch.export matches inputs by this signature, so the images are an argument of their own.
def _forward_for_logits(model: Any, last: LastBlock, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    last.calls.begin(model.global_pool == "token")  # `reset_classifier` may have changed the head.
    try:
        return type(model).forward(model, x, *args, **kwargs)
    finally:
        last.calls.end()


def _runs_as(model: nn.Module, cls: type[nn.Module]) -> bool:
    same = (getattr(type(model), name, None) is getattr(cls, name, None) for name in FORWARDS)
    return isinstance(model, cls) and all(same) and "forward" not in vars(model)


def _is_known(block: Any, reader: PrefixReader, num_prefix_tokens: int) -> bool:
    """Whether the parts of the block, run for the prefix tokens, compute what the block computes for them."""
    attn: Any = getattr(block, reader.shortened.attn, None)
    kinds = type(block) is reader.block and type(attn) is reader.shortened.attention
    if not kinds or type(block.mlp) not in _FEED_FORWARDS:
        return False
    if getattr(attn, "sr", None) is not None or type(getattr(attn, "qkv", None)) not in (nn.Linear, type(None)):
        return False  # Keys of a reduced map, or a projection that does more than multiply by its weight.
    if not all(map(is_untouched, (block, *attn.modules()))):
        return False
    local = [module.layout for module in block.modules() if isinstance(module, LocalizedProjection | FusedMlp)]
    return all(layout.num_prefix_tokens == num_prefix_tokens for layout in local)


def _without_adapter(mlp: nn.Module) -> nn.Module:
    """The feed-forward without its adapter: itself where it has none, else a copy."""
    if not localized_projections(mlp):
        return mlp
    plain = copy.deepcopy(mlp)
    remove_locality(plain)
    return plain
