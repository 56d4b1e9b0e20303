"""An ONNX file quantized to int8 by ONNX Runtime: products and convolutions, with ranges from calibration images."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.quiet import quiet, silent

OPERATORS = ("MatMul", "Gemm", "Conv")
"""What is quantized: nearly all of the work. Norms, softmax, activations and sums stay in float32, which loses less."""


def write_onnx_int8(float32: Path, path: Path, inputs: Sequence[np.ndarray], metadata: ExportMetadata) -> None:
    """Write the file `float32` quantized.

    Weights are symmetric, per channel and of 7 bits: processors without int8 instructions add products of 8 bits in 16
    bits, which would overflow.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet(), silent():
        simplified = Path(folder) / "simplified.onnx"
        quant_pre_process(str(float32), str(simplified), skip_symbolic_shape=True)
        [given] = onnx.load(simplified).graph.input
        quantize_static(
            simplified,
            path,
            _reader(given.name, inputs),
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    model = onnx.load(path)
    model.producer_name, model.producer_version = "localvit", metadata.versions.get("localvit", "")
    onnx.helper.set_model_props(model, metadata.to_strings())
    onnx.save(model, path)


def _reader(name: str, inputs: Sequence[np.ndarray]) -> Any:
    """The inputs as ONNX Runtime reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            each = next(self.left, None)
            return None if each is None else {name: each}

    return Reader()
