"""Every registered model of the package, made small: two blocks or so, images of 64 pixels.

A new family is tested as soon as it is registered. Without an entry in `SMALL` it is tested at its full size.
"""

from torch import nn

from localvit.models.factory import create_model
from localvit.models.family import Family
from localvit.models.pvt import LocalPVT
from localvit.models.registry import find_model, registered_models
from localvit.models.swin import LocalSwin
from localvit.models.t2t import LocalT2T
from localvit.models.tnt import LocalTNT
from localvit.models.vit import LocalViT
from localvit.tokens.mlp import LocalityMlp

SMALL: dict[type[Family], dict] = {
    LocalViT: {"depth": 2, "embed_dim": 48, "num_heads": 4, "reduction": 4},
    LocalSwin: {"embed_dim": 24, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 4},
    LocalTNT: {"depth": 2, "embed_dim": 48, "inner_dim": 12, "num_heads_inner": 3, "num_heads_outer": 3},
    LocalPVT: {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)},
    LocalT2T: {"depth": 2, "embed_dim": 48, "num_heads": 4, "reduction": 4},
}

MODELS = sorted(info.name for info in registered_models())
"""Each model once, under its own name."""

ALIASES = {info.alias: info.name for info in registered_models() if info.alias}
"""Aliases and the names that they stand for."""


def family(name: str) -> type[Family]:
    """The class of the named model."""
    info = find_model(name)
    assert info is not None
    return info.family


def small_model(name: str, **kwargs) -> nn.Module:
    """The named model with 7 classes, small; `kwargs` take precedence."""
    size = {"img_size": image_size(name), "num_classes": 7} | SMALL.get(family(name), {})
    return create_model(name, **size | kwargs)


def image_size(name: str) -> int:
    """Height and width of the images that `small_model(name)` is made for."""
    info = find_model(name)
    assert info is not None
    return min(info.input_size[1] // 2, 64)


def is_local(name: str) -> bool:
    """Whether any block of the named model has locality."""
    return any(isinstance(module, LocalityMlp) for module in small_model(name).modules())


def _parameters(name: str) -> int:
    info = find_model(name)
    assert info is not None
    return info.parameters


LOCAL = [name for name in MODELS if is_local(name)]
BASELINES = [name for name in MODELS if name not in LOCAL]
"""The models without locality that the paper compares with."""

ABSOLUTE = [name for name in MODELS if small_model(name).position_grids()]
"""The models with absolute position embeddings."""

ONE_OF_EACH = list({family(name): name for name in sorted(LOCAL, key=_parameters, reverse=True)}.values())
"""The smallest local model of each family, for what takes long or depends on the family only."""
