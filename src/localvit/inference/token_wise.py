"""Modules that compute each token by itself: run on some of the tokens, they give what they give these tokens of all.

Only exact classes are known, as they were when this file was imported. A subclass, a hook, a forward replaced on an
instance or on the class, and training mode may all look at other tokens.
"""

from collections.abc import Callable
from typing import Any

from timm import layers as timm_layers
from timm.layers import activations
from timm.models.vision_transformer import LayerScale
from torch import nn

from localvit.ops.stages import is_untouched

_CLASSES: tuple[type[nn.Module], ...] = (
    # A Sequential that is known consists of modules that are.
    *(nn.Identity, nn.Dropout, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Sequential),
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid),
    *(timm_layers.Mlp, timm_layers.GluMlp, timm_layers.SwiGLU),
    *(timm_layers.DropPath, LayerScale, timm_layers.LayerNorm, timm_layers.RmsNorm),
    *(activations.GELU, activations.GELUTanh, activations.QuickGELU, activations.Swish, activations.Mish),
    *(activations.Sigmoid, activations.Tanh, activations.HardSwish, activations.HardSigmoid),
)
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {cls: cls.forward for cls in _CLASSES}


def is_token_wise_class(module: nn.Module) -> bool:
    """Whether the class of a module, apart from its children and from hooks, computes each token by itself."""
    cls = type(module)
    return cls in _FORWARDS and cls.forward is _FORWARDS[cls] and not module.training


def is_token_wise(module: nn.Module) -> bool:
    """Whether a module in evaluation mode, with everything in it, computes each token by itself."""
    return all(is_token_wise_class(part) and is_untouched(part) for part in module.modules())
