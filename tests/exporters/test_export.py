"""An exported file computes what the model computes, carries all it needs, and is not left behind if it does not."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from exported_files import MEAN, NAMES, PREPROCESSING, STD, expected_probabilities, noise, run, tiny_model
from PIL import Image
from torch import nn

import localvit
from localvit.data.preprocessing import Preprocessing
from localvit.exporters import Onnx, OpenVINO, ProofError, TorchExport
from localvit.exporters.graph import build_graph, plain_copy
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.exported import ExportedModel
from localvit.inference.runner import load_model
from localvit.utils.weight_files import CheckpointError

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("shape", [(1, 3, 24, 24), (5, 3, 24, 24), (3, 3, 40, 16), (2, 3, 64, 64)])
def test_one_file_computes_probabilities_of_pixels_at_any_batch_and_size(exported, shape):
    path, _ = exported
    images = noise(*shape)
    np.testing.assert_allclose(run(path, images), expected_probabilities(images), rtol=0, atol=1e-6)


def test_nothing_is_left_beside_the_file_and_its_report(exported):
    path, report = exported
    assert {each.name for each in path.parent.iterdir()} == {"tiny.onnx", "tiny.onnx.json"}
    onnx.checker.check_model(onnx.load(path, load_external_data=False))
    kept = json.loads(path.with_name("tiny.onnx.json").read_text())
    assert kept["max_rel"] == report.max_rel < 1e-5
    assert kept["top1_agreement"] == 1
    assert {case["batch"] for case in kept["cases"]} >= {1, 5}
    assert len({(case["height"], case["width"]) for case in kept["cases"]}) >= 4
    assert any(case["height"] != case["width"] for case in kept["cases"])


def test_the_file_carries_classes_preprocessing_and_origin(exported, checkpoint):
    path, _ = exported
    props = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert json.loads(props["class_names"]) == NAMES
    preprocessing = json.loads(props["preprocessing"])
    assert preprocessing["input_size"] == [3, 24, 24]
    assert preprocessing["crop_pct"] == 0.8
    assert preprocessing["mean"] == list(MEAN)
    assert preprocessing["std"] == list(STD)
    assert preprocessing["interpolation"] == "bicubic"
    assert props["architecture"] == "localvit_tiny_mlp4_act3_r192"
    assert props["source_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert props["weights"] == "own"
    assert "uint8" in props["input"]
    assert props["output"] == "probabilities"
    assert json.loads(props["versions"])["localvit"] == localvit.__version__
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [side.dim_param or side.dim_value for side in shape.dim] == ["batch", 3, "height", "width"]


def test_raw_takes_normalized_images_and_returns_logits(raw):
    path, report = raw
    images = np.random.default_rng(0).standard_normal((1, 3, 24, 24), dtype=np.float32)
    with torch.inference_mode():
        expected = tiny_model()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(path, images), expected, rtol=0, atol=1e-5)
    assert report.fused
    assert onnx.load(path).opset_import[0].version == 18


def test_resize_takes_images_of_any_size_as_evaluation_prepares_them(resizing):
    path, report = resizing
    assert report.max_rel < 1e-5
    transform = PREPROCESSING.transform()
    for height, width in ((43, 61), (90, 37), (24, 24), (11, 13), (30, 129), (129, 30)):
        pixels = noise(height, width, 3, seed=height)
        with torch.inference_mode():
            expected = tiny_model()(transform(Image.fromarray(pixels))[None]).softmax(1).numpy()
        np.testing.assert_allclose(run(path, pixels.transpose(2, 0, 1)[None]), expected, rtol=0, atol=1e-6)


def test_a_graph_that_resizes_takes_floats_as_it_takes_pixels():
    settings = Onnx(include=("resize", "softmax"), input_type="float32")
    graph = build_graph(plain_copy(tiny_model()), PREPROCESSING, settings)
    pixels = noise(43, 61, 3)
    with torch.inference_mode():
        expected = tiny_model()(PREPROCESSING.transform()(Image.fromarray(pixels))[None]).softmax(1)
        found = graph(torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Wrong(nn.Module):
    """A model whose output depends on how it is run: traced, it computes something else."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = images.mean((2, 3))
        return pooled * 1.001 + 0.01 if torch.compiler.is_exporting() else pooled


def test_a_file_that_computes_something_else_is_not_kept(tmp_path):
    path = tmp_path / "wrong.onnx"
    path.write_bytes(b"an older file")
    preprocessing = Preprocessing(input_size=(8, 8), mean=MEAN, std=STD)
    with pytest.raises(ProofError, match="was not written") as caught:
        localvit.export(Wrong(), path, Onnx(), preprocessing=preprocessing, class_names=["a", "b", "c"])
    assert caught.value.report.max_rel > 1e-4
    assert path.read_bytes() == b"an older file"
    assert [each.name for each in tmp_path.iterdir()] == ["wrong.onnx"]


@dataclass(frozen=True, kw_only=True)
class DiesInTheRuntime(Onnx):
    """A format whose files are damaged."""

    name: ClassVar[str] = "dies"

    def write(self, program, path: Path, metadata: ExportMetadata) -> None:
        path.write_bytes(b"\x08")


def test_a_file_that_the_runtime_cannot_load_is_not_kept(tmp_path):
    path = tmp_path / "cut.onnx"
    with pytest.raises(ValueError, match="is not an ONNX file or is damaged"):
        localvit.export(tiny_model(), path, DiesInTheRuntime(), preprocessing=PREPROCESSING)
    assert list(tmp_path.iterdir()) == []


def test_the_model_stays_as_it_was(tmp_path):
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    localvit.export(model, tmp_path / "copy.pt2", TorchExport(), preprocessing=PREPROCESSING)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_openvino_computes_and_carries_the_same(checkpoint, tmp_path):
    pytest.importorskip("openvino")
    path = tmp_path / "tiny.xml"
    report = localvit.export(checkpoint, path, OpenVINO(dynamic="size"))
    assert report.max_rel < 1e-5
    loaded = load_model(path, input_size=(32, 16))
    assert loaded.about["metrics"] == {"acc1": 12.5}
    assert loaded.class_names == NAMES
    images = noise(3, 3, 32, 16)
    np.testing.assert_allclose(loaded.model.run(images), expected_probabilities(images), rtol=0, atol=1e-6)
    assert {each.name for each in tmp_path.iterdir()} == {"tiny.xml", "tiny.bin", "tiny.xml.json"}
    assert any("default precision" in note for note in report.notes)


def test_torch_export_computes_and_carries_the_same(checkpoint, tmp_path):
    """Reading such a file may run code in it, so that only those that are trusted are read."""
    path = tmp_path / "tiny.pt2"
    report = localvit.export(checkpoint, path, TorchExport(dynamic="size"))
    assert report.max_rel < 1e-5
    model = ExportedModel.open(path, trusted=True)
    metadata = model.metadata
    assert (metadata.class_names, metadata.about["metrics"]) == (NAMES, {"acc1": 12.5})
    images = noise(3, 3, 32, 16)
    np.testing.assert_allclose(model.run(images), expected_probabilities(images), rtol=0, atol=1e-6)
    assert {each.name for each in tmp_path.iterdir()} == {"tiny.pt2", "tiny.pt2.json"}
    with pytest.raises(CheckpointError, match="can run code"):
        load_model(path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"include": ("normalise",)}, "include='normalise'"),
        ({"dynamic": "all"}, "dynamic='all'"),
        ({"input_type": "int8"}, "input_type='int8'"),
        ({"opset": 7}, "opset=7"),
        ({"include": ("resize",), "dynamic": "size"}, "contradict"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Onnx(**options)


def test_a_model_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="does not define its preprocessing"):
        localvit.export(nn.Linear(3, 2), path)
    with pytest.raises(ValueError, match=r"let its name end in \.onnx"):
        localvit.export(tiny_model(), tmp_path / "model.xml")
    with pytest.raises(ValueError, match="3 class names for a model of 5 classes"):
        localvit.export(tiny_model(), path, preprocessing=PREPROCESSING, class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="only classifiers can be exported"):
        localvit.export(nn.Identity(), path, preprocessing=PREPROCESSING)
    assert list(tmp_path.iterdir()) == []
