"""Fuse a model for inference: batch norms folded, and no work for what the logits do not depend on."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.layers import Attention, use_fused_attn
from timm.models import pvt_v2, tnt
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localvit.inference.last_block import last_block, shorten_last_block
from localvit.locality import LocalityFeedForward
from localvit.ops.stages import is_plain, is_untouched
from localvit.surgery.projection import LocalizedProjection
from localvit.tokens.sources import stop_recognizing_inputs

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, inplace: bool = False) -> Model:
    """Fuse a model for inference: equal outputs up to rounding, less work.

    - The batch norms of every locality module are folded, and all others that follow timm's convention
      (`timm.models.reparameterize_model`).
    - The attention of TNT and Swin uses scaled_dot_product_attention, unless `timm.layers.set_fused_attn` disables it.
    - In families whose head reads the prefix tokens only, the last block computes nothing else
      (`localvit.inference.last_block`). This holds for `model(images)`; `forward_features` and
      `forward_intermediates` still return every token.
    - Modules that are not exactly known, because of a hook, a subclass or a replaced forward, stay as they are.

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
    if model.training or any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, where batch norms use the statistics of each batch and "
            "cannot be folded: call model.eval() before fuse"
        )
    fused = model if inplace else copy.deepcopy(model)
    _fuse_parts(fused)
    stop_recognizing_inputs(fused)  # That is for gradient checkpointing.
    for module in list(fused.modules()):
        shorten_last_block(module)
    return fused


def fuse_last_block(model: nn.Module) -> None:
    """Do in place what `fuse` does to the last block of a model whose head reads the prefix tokens only.

    The other blocks stay as they are, for runtimes that fold batch norms themselves.
    """
    stop_recognizing_inputs(model)
    for module in list(model.modules()):
        if block := last_block(module):
            _fuse_parts(block)
            shorten_last_block(module)


def _fuse_parts(module: nn.Module) -> None:
    """Fold the batch norms in a module and replace its attentions, in place."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    _fold(module)
    if len(dtypes) == 1:
        module.to(dtype=dtypes.pop())  # timm folds into float32.
    for name, part in list(module.named_modules()):
        if name and (faster := _ATTENTIONS.get(type(part))):
            module.set_submodule(name, faster(part))
    module.eval()  # Modules that are made here start in training mode.


def _fold(module: nn.Module) -> None:
    """timm's `reparameterize_model`, without the modules that something else than their class defines."""
    child: Any
    for name, child in module.named_children():
        if hasattr(child, "fuse") and _folds_as_written(child, "fuse"):
            setattr(module, name, child.fuse())
        elif hasattr(child, "reparameterize") and _folds_as_written(child, "reparameterize"):
            child.reparameterize()
        elif hasattr(child, "switch_to_deploy") and _folds_as_written(child, "switch_to_deploy"):
            child.switch_to_deploy()
        _fold(child)


def _folds_as_written(module: nn.Module, method: str) -> bool:
    """Whether folding a module gives what it computes.

    A class that overrides forward and not `method`, a hook, a forward of an instance, a layer or weight of another
    library, and a batch norm without weights or running statistics all give False. `LocalityFeedForward` looks itself.
    """
    if isinstance(module, LocalityFeedForward):
        return True
    if isinstance(module, LocalizedProjection):
        projection = module.projection()
        return not hasattr(projection, "fuse") or (is_untouched(module) and _folds_as_written(projection, "fuse"))
    defining = {name: next(cls for cls in type(module).__mro__ if name in vars(cls)) for name in ("forward", method)}
    return issubclass(defining[method], defining["forward"]) and all(
        is_untouched(part)
        and type(part).__module__.partition(".")[0] in ("torch", "torchvision", "timm")
        and all(map(is_plain, part._parameters.values()))
        and not (isinstance(part, _BatchNorm) and (part.weight is None or part.running_mean is None))
        for part in module.modules()
    )


NARROWEST_HEAD = 8
"""The width of a head from which scaled_dot_product_attention runs without padding on CUDA."""


class _NarrowAttention(Attention):
    """Attention whose heads are narrower than CUDA's fused kernels take: it uses them on the CPU only.

    With them TNT, whose heads over pixels have width 4, was slower fused than unfused on one H100.
    """

    @property  # type: ignore[misc]  # timm declares an attribute
    def fused_attn(self) -> bool:
        return self._fused_attn and self.qkv.weight.device.type == "cpu"

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        self._fused_attn = value


def _by_sdpa(attn: tnt.Attention) -> nn.Module:
    """TNT's attention, which computes its softmax in steps, as timm's `Attention`, which uses torch's fused kernel.

    It stays as it is if the queries have another width, or if it is not exactly what its class defines.
    """
    qk, v = attn.qk, attn.v
    plain_projections = {type(qk), type(v)} == {nn.Linear} and attn.hidden_dim == v.out_features
    if not plain_projections or (qk.bias is None) != (v.bias is None) or not _is_unchanged(attn):
        return attn
    cls = _NarrowAttention if v.out_features // attn.num_heads < NARROWEST_HEAD else Attention
    plain = cls(v.in_features, attn.num_heads, qkv_bias=v.bias is not None, device="meta")
    plain.qkv.weight = _stacked(qk.weight, v.weight)
    if v.bias is not None:
        plain.qkv.bias = _stacked(qk.bias, v.bias)
    plain.proj, plain.proj_drop = attn.proj, attn.proj_drop
    return plain.eval()


def _stacked(*weights: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat(weights).detach(), requires_grad=any(weight.requires_grad for weight in weights))


def _window_by_sdpa(attn: Any) -> nn.Module:
    """Swin's attention, for which timm disables scaled_dot_product_attention by default."""
    if _is_unchanged(attn) and type(attn.softmax) is nn.Softmax:
        attn.fused_attn = use_fused_attn()
    return attn


def _is_unchanged(attn: Any) -> bool:
    """Whether an attention has nothing that scaled_dot_product_attention would skip, and weights to put together."""
    return (
        type(attn).forward is _FORWARDS[type(attn)]
        and type(attn.attn_drop) in (nn.Dropout, nn.Identity)
        and isinstance(attn.proj, nn.Linear)
        and attn.scale == (attn.proj.in_features // attn.num_heads) ** -0.5
        and all(is_untouched(part) and all(map(is_plain, part._parameters.values())) for part in attn.modules())
    )


def _channels_last_reduction(attn: pvt_v2.Attention) -> nn.Module:
    """PVT's attention with channels-last weights for its spatial reduction, as its tokens are: torch copies others."""
    if type(attn.sr) is nn.Conv2d and is_plain(attn.sr.weight):
        attn.sr.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return attn


_ATTENTIONS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    tnt.Attention: _by_sdpa,
    WindowAttention: _window_by_sdpa,
    pvt_v2.Attention: _channels_last_reduction,
}
"""Makes a faster attention of one of exactly this class."""
_FORWARDS = {cls: cls.forward for cls in _ATTENTIONS}
