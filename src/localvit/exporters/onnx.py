"""ONNX, for ONNX Runtime, browsers and most other runtimes: one file, with its weights and metadata."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.export import ExportedProgram

from localvit.exporters.onnx_half import store_in_float16
from localvit.exporters.onnx_int8 import write_onnx_int8
from localvit.exporters.registry import Format, register
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.quiet import quiet
from localvit.inference.runtimes import AXES

OPSETS = range(18, 24)
"""The opsets that torch's exporter writes and ONNX Runtime reads."""


@register
@dataclass(frozen=True, kw_only=True)
class Onnx(Format):
    """Options of an ONNX file."""

    opset: int = 20
    """Version of the operators."""

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    requires: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    quantizes: ClassVar[bool] = True
    stores_float16: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opset not in OPSETS:
            raise ValueError(f"opset={self.opset}: choose {OPSETS.start} to {OPSETS.stop - 1}")

    def write(self, program: ExportedProgram, path: Path, metadata: ExportMetadata) -> None:
        write_onnx(program, path, self.opset, metadata)
        if self.precision == "float16":
            store_in_float16(path)

    def write_int8(self, float32: Path, path: Path, inputs: Sequence[np.ndarray], metadata: ExportMetadata) -> None:
        write_onnx_int8(float32, path, inputs, replace(metadata, precision="int8"))


def write_onnx(program: ExportedProgram, path: Path, opset: int, metadata: ExportMetadata) -> None:
    """Write a traced program as one ONNX file."""
    with quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=[metadata.output],
            verbose=False,
        )
        assert onnx_program is not None
        model = onnx_program.model
        _name_open_sides(model.graph)
        model.producer_name, model.producer_version = "localvit", metadata.versions.get("localvit", "")
        model.metadata_props.update(metadata.to_strings())
        onnx_program.save(path, external_data=False)


def _name_open_sides(graph: Any) -> None:
    """Name the open sides of the input `batch`, `height` and `width`, wherever they appear, instead of s77 and s53."""
    names = {
        str(side): axis for side, axis in zip(graph.inputs[0].shape, AXES, strict=True) if not isinstance(side, int)
    }
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for index, side in enumerate(value.shape):
            if not isinstance(side, int) and side.value is not None:
                value.shape[index] = pattern.sub(lambda found: names[found[1]], str(side.value))
