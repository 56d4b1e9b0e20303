"""Attention rollout: how much of each patch reaches the head through the attentions of all layers.

Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020, arXiv 2005.00928, section 3: the attention of a
layer is the mean of its heads and, for the shortcut, half the identity. The product over all layers is computed for
the tokens that the head reads only.

Two steps are not in that paper. A key that stands for several tokens (PVT's spatial reduction) passes its share on to
them in equal parts, and so does a token of a stage to those it was made of (Swin, PVT).

Shapes: B images, N tokens, H and W the grid of the first layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localvit.explanations.attention import AttentionMap, attention_maps
from localvit.explanations.layers import TokenGrid, layers_of


@torch.no_grad()
def rollout(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """The share (B, H, W) of each patch in what the head reads, by the attentions between patches.

    H and W are the grid of the first layer. The shares of an image sum to 1, without what stays in prefix tokens.
    Feed-forwards, and with them locality, are no part of it; nor are the inner attentions of TNT. It knows no class.

    Args:
        model: a model in evaluation mode, fused or not.
        images_BCHW: prepared images, on the model's device.

    Raises:
        ValueError: as `attention_maps`.
    """
    layers = layers_of(model)
    return rollout_of_maps(attention_maps(model, images_BCHW), layers.num_tokens_read)


def rollout_of_maps(maps: Sequence[AttentionMap], num_class_tokens: int) -> Tensor:
    """`rollout` of maps in the order of the forward pass; the head reads that many first tokens, 0 for the mean."""
    maps = [each for each in maps if not each.is_inner]
    share_BN = _read_by_head(maps[-1], num_class_tokens)
    for later, layer in zip((None, *reversed(maps[1:])), reversed(maps), strict=True):
        query = layer.placement.query
        if later is not None:
            share_BN = _to_grid(share_BN, later.placement.query, query)
        share_BN = (share_BN + _to_grid(layer.spread(share_BN), layer.placement.key, query)) / 2
    first = maps[0].placement.query
    share_BHW = share_BN[:, first.num_prefix_tokens :].unflatten(1, first.size)
    return share_BHW / share_BHW.sum((1, 2), keepdim=True)


def _read_by_head(last: AttentionMap, num_class_tokens: int) -> Tensor:
    weights, query = last.weights_BWMQK, last.placement.query
    share_BN = weights.new_zeros(weights.shape[0], len(query))
    read = slice(num_class_tokens) if num_class_tokens else slice(query.num_prefix_tokens, None)
    share_BN[:, read] = 1
    return share_BN / share_BN.sum(1, keepdim=True)


def _to_grid(share_BN: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
    """Shares of the tokens of a coarse grid as shares of a finer one, each in equal parts; the same for equal grids.

    Prefix tokens that the finer grid does not have are left out.
    """
    if old == new:
        return share_BN
    prefix_BP = share_BN[:, : min(old.num_prefix_tokens, new.num_prefix_tokens)]
    share_BHW = share_BN[:, old.num_prefix_tokens :].unflatten(1, old.size)
    for dim in (1, 2):
        share_BHW = _spread_evenly(share_BHW, dim, new.size[dim - 1])
    return torch.cat((prefix_BP, share_BHW.flatten(1)), dim=1)


def _spread_evenly(share_BHW: Tensor, dim: int, length: int) -> Tensor:
    """Give each row (or column) in equal parts to the rows that it stands for; the last one may stand for fewer."""
    short = share_BHW.shape[dim]
    owner = torch.arange(length, device=share_BHW.device) // -(-length // short)
    number = torch.bincount(owner, minlength=short).to(share_BHW.dtype)
    shape = [1, 1, 1]
    shape[dim] = length
    return share_BHW.index_select(dim, owner) / number[owner].view(shape)
