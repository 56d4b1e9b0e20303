"""int8 files: kept if they lose little on held-out images, refused if not, with the numbers in the report."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_files import NAMES, PREPROCESSING, tiny_model
from int8_images import balanced_model, drawn, write_images, write_labeled

import localvit
from localvit.data.images import DataError
from localvit.exporters import ExportReport, Int8, Onnx, OpenVINO, ProofError, TorchExport
from localvit.exporters.int8_gate import LARGEST_RMS_ERROR, LEAST_AGREEMENT, quantize_with_proof
from localvit.inference.runner import InferenceOptions, load_model
from localvit_cli import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OPTIONS = InferenceOptions(device=torch.device("cpu"), workers=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """train/ to calibrate with, labeled/ held out, and black/, which has nothing to do with them."""
    root = tmp_path_factory.mktemp("int8")
    images = drawn(240)
    write_images(root / "train", images[:40])
    write_labeled(root / "labeled", balanced_model(), images[40:])
    write_images(root / "black", np.zeros((40, 3, 30, 30), np.uint8))
    return root


@pytest.fixture(scope="module")
def float32(folders) -> ExportReport:
    """The file in float32, which is quantized in several ways."""
    path = folders / "float32" / "model.onnx"
    return localvit.export(balanced_model(), path, Onnx(), preprocessing=PREPROCESSING, class_names=NAMES)


def quantized(float32: ExportReport, path: Path, int8: Int8) -> ExportReport:
    return quantize_with_proof(float32.path, path, Onnx(int8=int8), float32)


def test_the_drop_is_that_of_evaluation(float32, folders, tmp_path):
    path, labeled = tmp_path / "int8.onnx", folders / "labeled"
    int8 = quantized(float32, path, Int8(calibrate=folders / "train", data_path=labeled, max_drop=25)).int8
    assert int8 is not None
    before = localvit.evaluate(float32.path, labeled, options=OPTIONS)
    after = localvit.evaluate(path, labeled, options=OPTIONS)
    assert int8.acc1_float32 == pytest.approx(before.acc1) == 100  # labeled by this model
    # In batches of other images, float32 rounds otherwise, and a value between two of int8 may fall to the other side:
    # up to two images of 200.
    assert int8.acc1_int8 == pytest.approx(after.acc1, abs=1)
    assert int8.drop == int8.acc1_float32 - int8.acc1_int8
    # Every image that changes is lost: of N images with a share p, the standard error of p.
    lost, count = int8.drop / 100, len(before.paths)
    assert int8.drop_standard_error == pytest.approx(100 * (lost * (1 - lost) / count) ** 0.5)
    assert int8.top1_agreement == pytest.approx(1 - lost)
    # The weights of all products are int8 now.
    assert onnx.TensorProto.INT8 in {each.data_type for each in onnx.load(path).graph.initializer}
    assert load_model(path).model.metadata.precision == "int8"
    assert load_model(path).class_names == NAMES


def test_the_error_of_logits_is_the_closed_form(float32, folders, tmp_path):
    path = tmp_path / "int8.onnx"
    with pytest.raises(ProofError, match="in int8, ") as caught:
        quantized(float32, path, Int8(calibrate=folders / "black", images=folders / "labeled"))
    int8 = caught.value.report.int8
    assert (int8.drop, int8.acc1_float32) == (None, None)
    assert int8.top1_agreement < LEAST_AGREEMENT
    assert int8.rms_error > LARGEST_RMS_ERROR
    both = [
        {each.file: each for each in localvit.predict(file, folders / "labeled", options=OPTIONS)}
        for file in (float32.path, path)
    ]
    centered = []
    for found in both:
        rows = np.array([np.log(found[file].probabilities)[np.argsort(found[file].classes)] for file in both[0]])
        centered.append(rows - rows.mean(1, keepdims=True))
    expected = np.sqrt(((centered[1] - centered[0]) ** 2).sum() / (centered[0] ** 2).sum())
    assert int8.rms_error == pytest.approx(expected, rel=0.02)  # rounded otherwise, as above


def test_a_file_that_was_calibrated_with_other_images_is_refused(float32, folders, tmp_path):
    """Black images do not show how large activations become."""
    int8 = Int8(calibrate=folders / "black", data_path=folders / "labeled", max_drop=25)
    with pytest.raises(ProofError, match=r"was not written: in int8, Acc@1 drops by \d+\.\d+ points") as caught:
        quantized(float32, tmp_path / "int8.onnx", int8)
    assert caught.value.report.int8.drop > 25


def test_the_command_writes_openvino_and_prints_the_comparison(checkpoint, folders, tmp_path, capsys):
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    held_out = write_labeled(tmp_path / "held out", tiny_model(), drawn(200))
    path = tmp_path / "made" / "tiny.xml"
    arguments = ["export", str(checkpoint), "--format", "openvino", "--output", str(path), "--int8"]
    assert main([*arguments, "--calibrate", str(folders / "train"), "--data-path", str(held_out)]) == 0
    out = capsys.readouterr().out
    assert "drop, points" in out
    assert f"on 200 held-out images of {held_out}" in out
    assert {each.name for each in path.parent.iterdir()} == {"tiny.xml", "tiny.bin", "tiny.xml.json"}
    kept = json.loads(path.with_name("tiny.xml.json").read_text())
    assert kept["int8"]["drop"] <= kept["int8"]["max_drop"] == 0.5
    sizes = [path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin")]
    assert kept["int8"]["bytes_int8"] == kept["bytes"] == sum(sizes)
    assert [each["batch"] for each in kept["int8"]["speeds"]] == [1, 16]
    assert min(each[kind] for each in kept["int8"]["speeds"] for kind in ("float32", "int8")) > 0
    assert 'element_type="i8"' in path.read_text()
    assert load_model(path).model.metadata.precision == "int8"


def test_a_refused_file_is_deleted_and_the_command_fails(checkpoint, folders, tmp_path, capsys):
    path = tmp_path / "tiny.onnx"
    path.write_bytes(b"an older file")
    arguments = ["export", str(checkpoint), "--output", str(path), "--int8", "--dynamic", "none"]
    assert main([*arguments, "--calibrate", str(folders / "black"), "--images", str(folders / "train")]) == 1
    out, err = capsys.readouterr()
    assert "same top class" in out
    assert "was not written: in int8, logits differ by" in err.splitlines()[-1]
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.onnx"]
    assert path.read_bytes() == b"an older file"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--int8"], "--int8 needs --calibrate"),
        (["--calibrate", "train"], "--calibrate belongs to --int8"),
        (["--max-drop", "1"], "--max-drop belongs to --int8"),
        (["--int8", "--calibrate", "train", "--max-drop", "0"], "--max-drop: max_drop=0 must be above 0"),
        (["--int8", "--calibrate", "train", "--include", "resize"], "resizing would not be exact"),
        (["--int8", "--calibrate", "train", "--format", "pt2"], "int8 is not written as pt2: choose onnx, openvino"),
    ],
)
def test_bad_usage_is_one_line_with_status_2(checkpoint, arguments, words, capsys):
    assert main(["export", str(checkpoint), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_formats_without_int8_say_which_have_it():
    with pytest.raises(ValueError, match="int8 is not written as pt2"):
        TorchExport(int8=Int8(calibrate="train"))


def test_a_missing_nncf_is_one_line_that_says_what_to_install(checkpoint, folders, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'int8 needs nncf .*pip install "localvit\[openvino\]"'):
        localvit.export(checkpoint, tmp_path / "tiny.xml", OpenVINO(int8=Int8(calibrate=folders / "train")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_path": "labeled", "max_drop": 0.01}, r"200 images cannot show a drop of 0\.01 points: give at least"),
        ({"images": "one"}, "too few to check int8: at least 20"),
    ],
)
def test_too_few_images_are_refused(float32, folders, tmp_path, options, words):
    write_images(folders / "one", drawn(1))
    paths = {key: value if key == "max_drop" else folders / value for key, value in options.items()}
    with pytest.raises(DataError, match=words):
        quantized(float32, tmp_path / "int8.onnx", Int8(**{"calibrate": folders / "train", **paths}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["calibrate", "data_path"])
def test_a_missing_folder_is_an_error_before_the_model_is_traced(folders, tmp_path, missing, monkeypatch):
    module = sys.modules["localvit.exporters.export"]
    monkeypatch.setattr(module, "trace", lambda *_: pytest.fail("the model was traced"))
    int8 = Int8(**{"calibrate": folders / "train", "data_path": folders / "labeled", missing: tmp_path / "none"})
    with pytest.raises(DataError, match=rf"--{missing.replace('_', '-')} .*none: no such folder"):
        localvit.export(balanced_model(), tmp_path / "a.onnx", Onnx(int8=int8), preprocessing=PREPROCESSING)
