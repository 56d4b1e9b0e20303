"""One small checkpoint and its ONNX file for all tests of exported files, which take seconds to make."""

from pathlib import Path

import pytest
from exported_files import NAMES, PREPROCESSING, tiny_model

from localvit.checkpoints import save_checkpoint
from localvit.exporters import ExportReport, Onnx, export


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    about = {"metrics": {"acc1": 12.5}}
    preprocessing = PREPROCESSING.to_dict()
    return save_checkpoint(tiny_model(), path, class_names=NAMES, preprocessing=preprocessing, about=about)


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory) -> tuple[Path, ExportReport]:
    """The checkpoint as ONNX with batch and size open."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    return path, export(checkpoint, path, Onnx(dynamic="size"))


@pytest.fixture(scope="session")
def raw(checkpoint, tmp_path_factory) -> tuple[Path, ExportReport]:
    """The fused model by itself, as ONNX of another opset with nothing open."""
    path = tmp_path_factory.mktemp("raw") / "tiny.onnx"
    return path, export(checkpoint, path, Onnx(include=(), dynamic="none", fuse=True, opset=18))


@pytest.fixture(scope="session")
def resizing(checkpoint, tmp_path_factory) -> tuple[Path, ExportReport]:
    """The checkpoint as ONNX that resizes itself."""
    path = tmp_path_factory.mktemp("resizing") / "tiny.onnx"
    return path, export(checkpoint, path, Onnx(include=("resize", "softmax")))
