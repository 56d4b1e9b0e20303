"""Every registered model of the package, made small: two blocks or so, images of 64 pixels."""

import timm
from torch import nn

_VIT = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4, "reduction": 4}
_TNT = {"img_size": 64, "depth": 2, "embed_dim": 48, "inner_dim": 12, "num_heads_inner": 3, "num_heads_outer": 3}
SMALL = {
    "localvit_vit": _VIT,
    "localvit_swin": {
        "img_size": 64,
        "embed_dim": 24,
        "depths": (2, 1, 1, 1),
        "num_heads": (1, 2, 3, 4),
        "window_size": 4,
    },
    "localvit_tnt": _TNT,
    "localvit_pvt": {"img_size": 64, "embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)},
    "localvit_t2t": {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4, "reduction": 4},
}
"""By the file of the family, which timm calls the module."""

FAMILY = {name: module for module in SMALL for name in timm.list_models(module=module)}
"""The family of every name that the package registers."""

FRIENDLY = {
    "localvit_tiny": "localvit_tiny_mlp4_act3_r192",
    "localvit_tiny_se4": "localvit_tiny_mlp4_act3_r4",
    "localvit_small": "localvit_small_mlp4_act3_r384",
    "localvit_swin_tiny": "localvit_swin_tiny_patch4_window7_224",
    "localvit_tnt_tiny": "localvit_tnt_t_patch16_224",
    "localvit_tnt_small": "localvit_tnt_s_patch16_224",
    "tnt_tiny": "tnt_t_patch16_224",
    "localvit_t2t_7": "localvit_T2t_conv7",
    "t2t_vit_7": "T2t_vit_7",
}
"""Friendly names and the published ones that they stand for."""

BASELINES = ["T2t_vit_7", "pvt_tiny", "tnt_t_patch16_224"]
LOCAL = sorted(FAMILY.keys() - FRIENDLY.keys() - set(BASELINES))
MODELS = [*BASELINES, *LOCAL]
"""Each model once, under its own name."""

ABSOLUTE = [name for name in MODELS if FAMILY[name] != "localvit_swin"]
"""The models with position embeddings of their own."""

ONE_OF_EACH = [
    "localvit_nano_patch4_32",
    "localvit_swin_tiny_patch4_window7_224",
    "localvit_tnt_t_patch16_224",
    "localvit_pvt_tiny",
    "localvit_T2t_conv7",
]
"""One local model a family, for what is dear or depends on the family alone."""


def small_model(name: str, **kwargs) -> nn.Module:
    """The named model with 7 classes, small; `kwargs` win."""
    size = SMALL[FAMILY[name]]
    if name == "localvit_nano_patch4_32":
        size = size | {"img_size": 16}
    return timm.create_model(name, **size | {"num_classes": 7} | kwargs)


def image_size(name: str) -> int:
    """Height and width of the images that `small_model(name)` is made for."""
    return 16 if name == "localvit_nano_patch4_32" else 64
