"""Attention maps of a model, read beside its own computation, which stays as it is.

While an attention runs, the arguments of its fused call (`scaled_dot_product_attention`) give its weights,
softmax(query key^T * scale + bias); an attention that computes its softmax itself gives that. So whatever is in these
arguments is in the maps: norms of queries and keys, rotary positions, relative position biases, masks. `fused_attn` is
never changed, and no forward is copied.

Shapes: B images, W windows (1 where every query sees every key), M heads, Q queries and K keys of one window, P prefix
tokens, H and W the grid of the queries, h and w that of the keys.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from localvit.explanations.layers import AttentionLayer, ModelLayers, Placement, Size, layers_of
from localvit.utils.wrappers import unwrap


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """The attention weights of one layer."""

    layer: str
    """Name of the attention in the model."""
    weights_BWMQK: Tensor
    """What each query attends to: rows sum to 1."""
    placement: Placement
    """Which tokens the queries and keys of each window are."""
    is_inner: bool = False
    """Whether it is between the pixels inside a patch (TNT), not between patches."""

    def on_grid(self) -> Tensor:
        """The weights (B, M, P + H * W, P' + h * w) between all tokens, zero between windows; padding is left out.

        A view where every query sees every key. Windows of a grid of 56 x 56 become 39 MB for each image and head.
        """
        if self._is_full:
            return self.weights_BWMQK[:, 0]
        batch, _, heads, _, _ = self.weights_BWMQK.shape
        placement = self.placement
        rows_WQ1, columns_W1K = placement.query_index_WQ[:, :, None], placement.key_index_WK[:, None, :]
        num_queries, num_keys = len(placement.query), len(placement.key)
        kept_WQK = (rows_WQ1 >= 0) & (columns_W1K >= 0)
        flat = (rows_WQ1 * num_keys + columns_W1K)[kept_WQK].to(self.weights_BWMQK.device)
        values = self.weights_BWMQK.permute(0, 2, 1, 3, 4)[..., kept_WQK.to(self.weights_BWMQK.device)]
        dense = values.new_zeros(batch, heads, num_queries * num_keys)
        dense[..., flat] = values
        return dense.unflatten(2, (num_queries, num_keys))

    def spread(self, share_BN: Tensor) -> Tensor:
        """Pass shares (B, P + H * W) of the queries on to the keys (B, P' + h * w), by the mean weights of the heads.

        What would go to padding is left out.
        """
        placement, device = self.placement, share_BN.device
        query_WQ, key_WK = placement.query_index_WQ.to(device), placement.key_index_WK.to(device)
        share_BWQ = share_BN[:, query_WQ.clamp(min=0)] * (query_WQ >= 0)
        passed_BWK = torch.einsum("bwq,bwqk->bwk", share_BWQ, self.weights_BWMQK.mean(2).to(share_BN.dtype))
        keys_BN = share_BN.new_zeros(share_BN.shape[0], len(placement.key) + 1)
        keys_BN.index_add_(1, torch.where(key_WK >= 0, key_WK, len(placement.key)).flatten(), passed_BWK.flatten(1))
        return keys_BN[:, :-1]

    @property
    def _is_full(self) -> bool:
        return self.weights_BWMQK.shape[1] == 1 and bool((self.placement.query_index_WQ >= 0).all())


@torch.no_grad()
def attention_maps(model: nn.Module, images_BCHW: Tensor) -> list[AttentionMap]:
    """The attention maps of every layer, in the order of the forward pass.

    Args:
        model: a model in evaluation mode, fused or not. A compiled one runs uncompiled.
        images_BCHW: prepared images, on the model's device.

    Returns:
        One map for each attention. TNT has an inner and an outer one in each block.

    Raises:
        ValueError: for a model that is not supported (see `layers_of`), and one whose attention computes no weights.
    """
    return output_and_maps(model, layers_of(model), images_BCHW)[1]


def output_and_maps(model: nn.Module, layers: ModelLayers, images_BCHW: Tensor) -> tuple[Any, list[AttentionMap]]:
    """What the model returns, and the maps of the layers in that call."""
    recorder = _Recorder()
    with recorder.watching(layers.attentions), recorder:
        output = unwrap(model)(images_BCHW)
    size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
    batch = images_BCHW.shape[0]
    return output, [_as_map(layer, recorder.weights.get(layer.name, []), batch, size) for layer in layers.attentions]


def _as_map(layer: AttentionLayer, weights: Sequence[Tensor], batch: int, image_size: Size) -> AttentionMap:
    if len(weights) != 1:
        raise ValueError(
            f"{layer.name} ({type(layer.module).__name__}) computes {len(weights)} attention maps in a forward pass, "
            "not one: this kind of attention cannot be shown"
        )
    placement = layer.placement(image_size)
    windows, queries = placement.query_index_WQ.shape
    expected = (batch * windows, queries, placement.key_index_WK.shape[1])
    rows, _, num_queries, num_keys = weights[0].shape
    if (rows, num_queries, num_keys) != expected:
        raise ValueError(
            f"{layer.name} attends from {num_queries} to {num_keys} tokens in {rows} windows, where {expected[1]} to "
            f"{expected[2]} in {expected[0]} were expected: were some masked or dropped?"
        )
    return AttentionMap(
        layer=layer.name,
        weights_BWMQK=weights[0].unflatten(0, (batch, windows)),
        placement=placement,
        is_inner=layer.is_inner,
    )


class _Recorder(TorchFunctionMode):
    """Keeps the attention weights (rows, M, Q, K) that are computed while a watched module runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, list[Tensor]] = {}
        self._running: list[str] = []

    @contextmanager
    def watching(self, layers: Sequence[AttentionLayer]) -> Iterator[None]:
        # A fused model whose last block computes the class token only sees these hooks, and computes every token.
        handles = []
        for layer in layers:
            handles.append(
                layer.module.register_forward_pre_hook(lambda *_, name=layer.name: self._running.append(name))
            )
            handles.append(layer.module.register_forward_hook(lambda *_: self._end(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _end(self) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._running:
            if func is F.scaled_dot_product_attention:
                self._keep(weights_of_fused_call(*args, **kwargs))
            elif func in _SOFTMAX and result.ndim == 4:
                self._keep(result.detach())
        return result

    def _keep(self, weights: Tensor) -> None:
        self.weights.setdefault(self._running[-1], []).append(weights)


_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


@torch.no_grad()
def weights_of_fused_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights (B, M, Q, K), at least in single precision, of a call of `scaled_dot_product_attention`.

    The arguments are those of torch's function, whose documentation defines the weights.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(precise), key.to(precise)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)
