"""The inference form of a model: batch norms folded, and no work for what the logits do not depend on.

Where a head reads the prefix tokens alone (class, distillation), the last block's patches reach nothing: its queries,
projections and feed-forward run for the prefix tokens only, and its locality, which does not act on them, not at all.

Shapes: B batch, N tokens, P prefix tokens, C channels, M attention heads, D channels of a head.
"""

import copy
from typing import Any, TypeVar

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from timm.utils import reparameterize_model
from torch import Tensor, nn

from localvit.surgery.branch import CHILD, LocalityBranch, attach, detach, has_branch
from localvit.tokens import FusedMlp

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """A copy of a model in its inference form: equal outputs, less work. The original is left as it is.

    Folds the batch norms of every locality module, and of whatever else follows timm's convention
    (`timm.utils.model.reparameterize_model`); drops the dead work of the last block where timm's VisionTransformer
    reads prefix tokens alone. That holds for `model(pictures)`; `forward_features` and `forward_intermediates` still
    give every token. Device, dtype and memory format stay. The copy cannot be trained, nor loaded into.

    Raises:
        ValueError: for a model in training mode.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, where batch norms take each batch's statistics and cannot be "
            "folded: call model.eval() before fuse"
        )
    fused = copy.deepcopy(model)
    branches = {name: branch for name, branch in fused.named_modules() if isinstance(branch, LocalityBranch)}
    reparameterize_model(fused, inplace=True)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) == 1:
        fused.to(dtype=dtypes.pop())  # timm folds into float32
    for name, branch in branches.items():
        projection = fused.get_submodule(name.removesuffix(f".{CHILD}"))
        if not has_branch(projection):  # what it hung on was folded into something new
            attach(projection, branch)
    for module in fused.modules():
        if isinstance(module, VisionTransformer) and _reads_prefix_alone(module):
            _shorten_last_block(module)
    return fused


def _reads_prefix_alone(model: VisionTransformer) -> bool:
    last: Any = list(model.blocks)[-1] if len(model.blocks) else None
    # Other pooling reads the patches; other blocks and attentions compute something else.
    plain = type(last) is Block and type(last.attn) is Attention
    return plain and model.global_pool == "token" and model.attn_pool is None


def _shorten_last_block(model: Any) -> None:
    last = LastBlock(model.blocks[-1], model.num_prefix_tokens)
    model.blocks[-1] = last
    model.register_forward_pre_hook(last.begin)
    model.register_forward_hook(last.end, always_call=True)


class LastBlock(nn.Module):
    """A transformer's last block that, while the whole model runs, computes the prefix tokens alone.

    Maps (B, N, C) to (B, P, C) then, and to (B, N, C) when it is called by itself.
    """

    def __init__(self, block: Any, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block = block
        self.num_prefix_tokens = num_prefix_tokens
        self.for_logits = False
        # That of the prefix tokens; the paper's form does not act on them.
        self.mlp = None if isinstance(block.mlp, FusedMlp) else _without_branch(block.mlp)

    def begin(self, model: nn.Module, args: tuple) -> None:
        """The whole model begins: nothing but its logits is wanted."""
        self.for_logits = True

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        """The whole model is done."""
        self.for_logits = False

    def forward(self, x_BNC: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        if masked or not self.for_logits:
            return self.block(x_BNC, *args, **kwargs)
        block = self.block
        x_BPC = x_BNC[:, : self.num_prefix_tokens] + block.ls1(self._attend(block.norm1(x_BNC)))
        return x_BPC if self.mlp is None else x_BPC + block.ls2(self.mlp(block.norm2(x_BPC)))

    def _attend(self, y_BNC: Tensor) -> Tensor:
        """What timm's `Attention` gives to the prefix tokens."""
        attn, y_BPC = self.block.attn, y_BNC[:, : self.num_prefix_tokens]
        heads = (attn.num_heads, attn.head_dim)
        dim = attn.num_heads * attn.head_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        query = F.linear(y_BPC, weight[:dim], None if bias is None else bias[:dim])
        key, value = F.linear(y_BNC, weight[dim:], None if bias is None else bias[dim:]).chunk(2, dim=-1)
        query_BMPD, key_BMND, value_BMND = (each.unflatten(2, heads).transpose(1, 2) for each in (query, key, value))
        out_BMPD = F.scaled_dot_product_attention(attn.q_norm(query_BMPD), attn.k_norm(key_BMND), value_BMND)
        out_BPC = attn.norm(out_BMPD.transpose(1, 2).flatten(2))
        if getattr(attn, "gate", None) is not None:
            out_BPC = out_BPC * attn.gate(y_BPC).sigmoid()
        return attn.proj(out_BPC)


def _without_branch(mlp: nn.Module) -> nn.Module:
    """The feed-forward without its branch: itself where it has none, else a copy."""
    hosts = [name for name, module in mlp.named_modules() if has_branch(module)]
    if not hosts:
        return mlp
    plain = copy.deepcopy(mlp)
    for name in hosts:
        detach(plain.get_submodule(name))
    return plain
