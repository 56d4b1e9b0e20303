"""Every registered model of the package, made small: two blocks or so, pictures of 64 pixels."""

import timm
from torch import nn

_VIT = dict(img_size=64, depth=2, embed_dim=48, num_heads=4, reduction=4)
_TNT = dict(img_size=64, depth=2, embed_dim=48, inner_dim=12, num_heads_inner=3, num_heads_outer=3)
SMALL = {
    "localvit_vit": _VIT,
    "localvit_swin": dict(img_size=64, embed_dim=24, depths=(2, 1, 1, 1), num_heads=(1, 2, 3, 4), window_size=4),
    "localvit_tnt": _TNT,
    "localvit_pvt": dict(img_size=64, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 2), num_heads=(1, 2, 3, 4)),
    "localvit_t2t": dict(img_size=64, depth=2, embed_dim=48, num_heads=4, reduction=4),
}
"""By the file of the family, which timm calls the module."""

FAMILY = {name: module for module in SMALL for name in timm.list_models(module=module)}
"""The family of every name that the package registers."""

NAMES = sorted(FAMILY)
ONE_OF_EACH = ["localvit_nano_patch4_32", "localvit_swin_tiny", "localvit_tnt_tiny", "localvit_pvt_tiny", "localvit_t2t_7"]
"""One local model a family, for what is dear or depends on the family alone."""
BASELINES = ["tnt_tiny", "pvt_tiny", "t2t_vit_7"]
ABSOLUTE = [name for name in NAMES if FAMILY[name] != "localvit_swin"]
"""The models with position embeddings of their own."""


def small_model(name: str, **kwargs) -> nn.Module:
    """The named model with 7 classes, small; `kwargs` win."""
    size = SMALL[FAMILY[name]]
    if name == "localvit_nano_patch4_32":
        size = size | dict(img_size=16)
    return timm.create_model(name, **size | dict(num_classes=7) | kwargs)


def picture_size(name: str) -> int:
    """Height and width of the pictures that `small_model(name)` is made for."""
    return 16 if name == "localvit_nano_patch4_32" else 64
