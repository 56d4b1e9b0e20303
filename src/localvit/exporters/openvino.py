"""OpenVINO's IR, for Intel's processors: a .xml file with the graph and metadata, and its weights in a .bin file."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch.export import ExportedProgram

from localvit.exporters.onnx import write_onnx
from localvit.exporters.registry import Format, register
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.runtimes import OpenVINORuntime, Runtime

_OPSET = 20


@register
@dataclass(frozen=True, kw_only=True)
class OpenVINO(Format):
    """Options of an OpenVINO file. It is converted from ONNX: OpenVINO's direct converter lacks some operators."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    requires: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")
    extra: ClassVar[str] = "openvino"

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]

    def other_runtimes(self, path: Path) -> list[tuple[str, Runtime]]:
        runtime = OpenVINORuntime(path, precision=None)
        return [(f"with OpenVINO's default precision on this machine, {runtime.precision}", runtime)]

    def write(self, program: ExportedProgram, path: Path, metadata: ExportMetadata) -> None:
        import openvino

        with tempfile.TemporaryDirectory() as folder:
            onnx_path = Path(folder) / "model.onnx"
            write_onnx(program, onnx_path, _OPSET, metadata)
            model = openvino.convert_model(onnx_path)
        for key, value in metadata.to_strings().items():
            model.set_rt_info(value, ["localvit", key])
        openvino.save_model(model, path, compress_to_fp16=False)
