"""A model as a file that other runtimes execute, with proof that it computes the same: a registry, a file a format."""

from localvit.exporters.export import export
from localvit.exporters.coreml import CoreML
from localvit.exporters.executorch import ExecuTorch
from localvit.exporters.int8 import Int8
from localvit.exporters.litert import LiteRT
from localvit.exporters.onnx import Onnx
from localvit.exporters.openvino import OpenVINO
from localvit.exporters.proof import ProofError
from localvit.exporters.pt2 import TorchExport
from localvit.exporters.registry import FORMATS, Format
from localvit.exporters.report import ExportReport

__all__ = [
    "FORMATS",
    "CoreML",
    "ExecuTorch",
    "ExportReport",
    "Format",
    "Int8",
    "LiteRT",
    "Onnx",
    "OpenVINO",
    "ProofError",
    "TorchExport",
    "export",
]
