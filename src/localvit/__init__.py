"""localvit: locality for vision transformers (LocalViT, arXiv 2104.05707).

Importing registers the models with timm and touches no GPU.
"""

from importlib.metadata import version

from localvit import models
from localvit.checkpoints import load_checkpoint, model_from_checkpoint, read_checkpoint, save_checkpoint
from localvit.inference.cost import locality_report
from localvit.inference.fusion import fuse
from localvit.locality import LocalityFeedForward
from localvit.surgery.adapter import Adapter
from localvit.surgery.localize import delocalize, localize
from localvit.surgery.replace import Replace
from localvit.surgery.weights import load_locality, save_locality
from localvit.models.factory import create_model
from localvit.models.registry import list_models

__version__ = version("localvit")

__all__ = [
    "Adapter",
    "LocalityFeedForward",
    "Replace",
    "create_model",
    "delocalize",
    "fuse",
    "list_models",
    "load_checkpoint",
    "load_locality",
    "locality_report",
    "localize",
    "model_from_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "save_locality",
]
