"""localvit: locality for vision transformers (LocalViT, arXiv 2104.05707).

Importing it registers the models with timm; it does not initialize a GPU.
"""

from localvit import models, train
from localvit.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    model_from_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from localvit.evaluation.evaluate import Evaluation, evaluate
from localvit.evaluation.predict import Prediction, predict
from localvit.hub import HubError, from_hub, push, save_hub_folder
from localvit.explanations import Explanation, explain
from localvit.exporters import CoreML, ExecuTorch, ExportReport, Int8, LiteRT, Onnx, OpenVINO, TorchExport, export
from localvit.inference.cost import locality_report
from localvit.inference.fusion import fuse
from localvit.inference.runner import InferenceOptions, LoadedModel, load_model
from localvit.locality import LocalityFeedForward
from localvit.models.factory import create_model
from localvit.models.registry import list_models
from localvit.models.simple_pyramid import SimplePyramid
from localvit.surgery.adapter import Adapter
from localvit.surgery.from_pretrained import from_pretrained
from localvit.surgery.localize import delocalize, localize
from localvit.surgery.replace import Replace
from localvit.surgery.weights import load_locality, save_locality
from localvit.utils.version import VERSION

__version__ = VERSION

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "CoreML",
    "Evaluation",
    "ExecuTorch",
    "Explanation",
    "ExportReport",
    "HubError",
    "InferenceOptions",
    "Int8",
    "LiteRT",
    "LoadedModel",
    "LocalityFeedForward",
    "Onnx",
    "OpenVINO",
    "Prediction",
    "Replace",
    "SimplePyramid",
    "TorchExport",
    "create_model",
    "delocalize",
    "evaluate",
    "explain",
    "export",
    "from_hub",
    "from_pretrained",
    "fuse",
    "list_models",
    "load_checkpoint",
    "load_locality",
    "load_model",
    "locality_report",
    "localize",
    "model_from_checkpoint",
    "predict",
    "push",
    "read_checkpoint",
    "save_checkpoint",
    "save_hub_folder",
    "save_locality",
    "train",
]
