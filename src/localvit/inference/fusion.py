"""The inference form of a model: batch norms folded, and no work for what the logits do not depend on."""

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
from localvit.surgery.branch import CHILD, LocalityBranch, attach, has_branch

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """A copy of a model in its inference form: equal outputs, less work. The original is left as it is.

    Folds the batch norms of every locality module, and of whatever else follows timm's convention
    (`timm.utils.model.reparameterize_model`); has TNT's and Swin's attention done by scaled_dot_product_attention,
    unless timm is told otherwise (`timm.layers.set_fused_attn`); drops the last block's dead work in families whose
    head reads prefix tokens alone (`localvit.inference.last_block`). That holds for `model(images)`; `forward_features`
    and `forward_intermediates` still give every token. Device and dtype stay, and so does the memory format, but for
    the weights of PVT's spatial reduction. The copy cannot be trained, nor loaded into.

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
    for name, module in list(fused.named_modules()):
        if name and (faster := _ATTENTIONS.get(type(module))):
            fused.set_submodule(name, faster(module))
    for module in list(fused.modules()):
        shorten_last_block(module)
    return fused


def _by_sdpa(attn: tnt.Attention) -> nn.Module:
    """TNT's attention, which takes its softmax step by step, as timm's plain one, which leaves it to torch.

    One of another query width, whose projections are no plain linear layers, or that somebody hooks stays as it is.
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
    """Swin's attention, in which timm has scaled_dot_product_attention switched off."""
    attn.fused_attn = use_fused_attn()
    return attn


def _reduced_in_place(attn: pvt_v2.Attention) -> nn.Module:
    """PVT's attention, whose weights for the spatial reduction lie as its tokens do, or torch copies them each time."""
    if attn.sr is not None:
        attn.sr.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return attn


_ATTENTIONS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    tnt.Attention: _by_sdpa,
    WindowAttention: _window_by_sdpa,
    pvt_v2.Attention: _reduced_in_place,
}
"""The faster form of an attention, by its exact class."""
