"""float16 files: half as large, computed in float32, with errors of the size of the weights' rounding."""

import numpy as np
import pytest
from exported_files import expected_probabilities, noise

import localvit
from localvit.exporters import Int8, Onnx, OpenVINO, TorchExport
from localvit.exporters.onnx_half import store_in_float16
from localvit.inference.exported import ExportedModel

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def test_weights_are_stored_in_float16_and_computed_in_float32(checkpoint, tmp_path):
    path = tmp_path / "half.onnx"
    report = localvit.export(checkpoint, path, Onnx(precision="float16", dynamic="none"))
    assert 1e-6 < report.max_rel < 5e-3  # float32 is below, as other tests show
    assert report.tolerance == 5e-3
    graph = onnx.load(path).graph
    stored = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    for weight in graph.initializer:
        if weight.data_type in stored:
            stored[weight.data_type] += int(np.prod(weight.dims))
    assert stored[onnx.TensorProto.FLOAT16] > 20 * stored[onnx.TensorProto.FLOAT]
    computed = {output for node in graph.node if node.op_type not in ("Cast", "Constant") for output in node.output}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    assert onnx.TensorProto.FLOAT16 not in {types[name] for name in computed if name in types}
    model = ExportedModel.open(path)
    assert model.metadata.precision == "float16"
    images = noise(1, 3, 24, 24)
    np.testing.assert_allclose(model.run(images), expected_probabilities(images), rtol=0, atol=5e-3)


def test_a_rewritten_file_computes_with_rounded_weights(exported, tmp_path):
    """The control is the float32 file with its weights rounded by NumPy."""
    half, rounded = tmp_path / "half.onnx", tmp_path / "rounded.onnx"
    half.write_bytes(exported[0].read_bytes())
    store_in_float16(half)
    model = onnx.load(exported[0])
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size >= 64:
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16).astype(np.float32), weight.name))
    onnx.save(model, rounded)
    images = noise(3, 3, 40, 16)
    found, expected = (ExportedModel.open(path).run(images) for path in (half, rounded))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_openvino_stores_half(checkpoint, tmp_path):
    pytest.importorskip("openvino")
    path = tmp_path / "half.xml"
    report = localvit.export(checkpoint, path, OpenVINO(precision="float16", dynamic="none"))
    assert 1e-6 < report.max_rel < 5e-3
    parameters = sum(value.numel() for value in localvit.model_from_checkpoint(checkpoint)[0].parameters())
    assert path.with_suffix(".bin").stat().st_size < 3 * parameters  # 2 bytes each, and some constants
    assert ExportedModel.open(path).metadata.precision == "float16"


@pytest.mark.parametrize(
    ("settings", "options", "match"),
    [
        (Onnx, {"precision": "bfloat16"}, "precision='bfloat16': choose float32 or float16"),
        (TorchExport, {"precision": "float16"}, "is not written as pt2: choose onnx, openvino"),
        (Onnx, {"precision": "float16", "int8": Int8(calibrate="train")}, "contradict each other"),
    ],
)
def test_what_is_not_possible_is_refused(settings, options, match):
    with pytest.raises(ValueError, match=match):
        settings(**options)
