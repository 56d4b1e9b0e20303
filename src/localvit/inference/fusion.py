"""Fuse a model for inference: batch norms folded, and no work for what the logits do not depend on."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.layers import Attention, use_fused_attn
from timm.models import pvt_v2, tnt
from timm.models.swin_transformer import WindowAttention
from timm.utils import reparameterize_model
from torch import Tensor, nn

from localvit.inference.last_block import shorten_last_block
from localvit.ops.stages import is_untouched
from localvit.tokens.sources import stop_recognizing_inputs

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, inplace: bool = False) -> Model:
    """Fuse a model for inference: equal outputs up to rounding, less work.

    - The batch norms of every locality module are folded, and all others that follow timm's convention
      (`timm.utils.model.reparameterize_model`).
    - The attention of TNT and Swin uses scaled_dot_product_attention, unless `timm.layers.set_fused_attn` disables it.
    - In families whose head reads the prefix tokens only, the last block computes nothing else
      (`localvit.inference.last_block`). This holds for `model(images)`; `forward_features` and
      `forward_intermediates` still return every token.

    Device, dtype and memory format stay the same, except for the weights of PVT's spatial reduction, which become
    channels-last. A fused model cannot be trained, and checkpoints do not load into it.

    Args:
        model: a model in evaluation mode.
        inplace: change `model` itself, which saves the memory of a second model; it can then no longer be trained. By
            default `model` stays as it is, and a changed deep copy is returned.

    Returns:
        The fused model.

    Raises:
        ValueError: for a model in training mode.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, where batch norms use the statistics of each batch and "
            "cannot be folded: call model.eval() before fuse"
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    fused = model if inplace else copy.deepcopy(model)
    reparameterize_model(fused, inplace=True)
    if len(dtypes) == 1:
        fused.to(dtype=dtypes.pop())  # timm folds into float32.
    for name, module in list(fused.named_modules()):
        if name and (faster := _ATTENTIONS.get(type(module))):
            fused.set_submodule(name, faster(module))
    stop_recognizing_inputs(fused)  # That is for gradient checkpointing.
    for module in list(fused.modules()):
        shorten_last_block(module)
    return fused


def _by_sdpa(attn: tnt.Attention) -> nn.Module:
    """TNT's attention, which computes its softmax in steps, as timm's `Attention`, which uses torch's fused kernel.

    It stays as it is if the queries have another width, its projections are not plain linear layers, or it has hooks.
    """
    qk, v = attn.qk, attn.v
    plain_projections = {type(qk), type(v)} == {nn.Linear} and attn.hidden_dim == v.out_features
    if not plain_projections or not all(map(is_untouched, attn.modules())):
        return attn
    plain = Attention(v.in_features, attn.num_heads, qkv_bias=v.bias is not None, device="meta")
    plain.qkv.weight = _stacked(qk.weight, v.weight)
    if v.bias is not None:
        plain.qkv.bias = _stacked(qk.bias, v.bias)
    plain.proj = attn.proj
    return plain.eval()


def _stacked(*weights: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat(weights).detach(), requires_grad=any(weight.requires_grad for weight in weights))


def _window_by_sdpa(attn: Any) -> nn.Module:
    """Swin's attention, for which timm disables scaled_dot_product_attention by default."""
    attn.fused_attn = use_fused_attn()
    return attn


def _channels_last_reduction(attn: pvt_v2.Attention) -> nn.Module:
    """PVT's attention with channels-last weights for its spatial reduction, as its tokens are: torch copies others."""
    if attn.sr is not None:
        attn.sr.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return attn


_ATTENTIONS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    tnt.Attention: _by_sdpa,
    WindowAttention: _window_by_sdpa,
    pvt_v2.Attention: _channels_last_reduction,
}
"""Makes a faster attention of one of exactly this class."""
