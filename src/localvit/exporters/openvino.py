"""OpenVINO's IR, for Intel's processors: a .xml file with the graph and metadata, and its weights in a .bin file."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.export import ExportedProgram

from localvit.exporters.onnx import write_onnx
from localvit.exporters.registry import Format, register
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.quiet import quiet, silent
from localvit.inference.runtimes import OpenVINORuntime, Runtime, openvino_core

_OPSET = 20


@register
@dataclass(frozen=True, kw_only=True)
class OpenVINO(Format):
    """Options of an OpenVINO file. It is converted from ONNX: OpenVINO's direct converter lacks some operators."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    requires: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")
    extra: ClassVar[str] = "openvino"
    quantizes: ClassVar[bool] = True
    stores_float16: ClassVar[bool] = True

    def check_installed(self) -> None:
        super().check_installed()
        if self.int8 is not None:
            with _nncf():
                pass

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
        _save(model, path, metadata)

    def write_int8(self, float32: Path, path: Path, inputs: Sequence[np.ndarray], metadata: ExportMetadata) -> None:
        model = quantize_openvino(openvino_core().read_model(float32), inputs)
        _save(model, path, replace(metadata, precision="int8"))


def quantize_openvino(model: Any, inputs: Sequence[np.ndarray]) -> Any:
    """A model of OpenVINO quantized by NNCF, with the schemes for transformers: symmetric weights, asymmetric
    activations, and no quantization where attention and norms are sensitive to it."""
    with _nncf() as nncf:
        return nncf.quantize(
            model,
            nncf.Dataset(list(inputs)),
            subset_size=len(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
        )


def _save(model: Any, path: Path, metadata: ExportMetadata) -> None:
    import openvino

    for key, value in metadata.to_strings().items():
        model.set_rt_info(value, ["localvit", key])
    openvino.save_model(model, path, compress_to_fp16=metadata.precision == "float16")


@contextlib.contextmanager
def _nncf() -> Iterator[Any]:
    """NNCF, without its messages, its progress bars and its reports of usage over the network.

    Raises ImportError, with what to install.
    """
    environment = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"  # read when it is imported
    with silent():
        try:
            import nncf
        except ImportError as error:
            raise ImportError(f'int8 needs nncf ({error}): pip install "localvit[openvino]"') from error
        finally:
            del os.environ["NNCF_CI"]
            os.environ.update({} if environment is None else {"NNCF_CI": environment})
        with quiet():
            yield nncf
