"""Exported files in evaluate, predict and info: the checkpoint's results, and one clear line for bad files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_files import NAMES, PREPROCESSING, linear_model, noise
from PIL import Image

import localvit
from localvit.inference.runner import InferenceOptions, load_model
from localvit.utils.weight_files import CheckpointError
from localvit_cli import main
from processes import run_source, start, status_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OPTIONS = InferenceOptions(device=torch.device("cpu"), workers=0, batch_size=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two images of each class, of several sizes; the classes sort otherwise than the model's."""
    folder = tmp_path_factory.mktemp("images")
    for index, name in enumerate(reversed(NAMES)):
        for number in range(2):
            file = folder / name / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            pixels = noise(31 + 7 * index, 43 - 3 * number, 3, seed=10 * index + number)
            Image.fromarray(pixels).save(file)
    return folder


@pytest.mark.parametrize("kind", ["exported", "resizing"])
def test_evaluation_is_that_of_the_checkpoint(kind, checkpoint, images, request):
    path, _ = request.getfixturevalue(kind)
    expected = localvit.evaluate(checkpoint, images, options=OPTIONS)
    found = localvit.evaluate(path, images, options=OPTIONS)
    assert found.line() == expected.line()
    assert found.class_names == NAMES
    assert torch.equal(found.labels_N, expected.labels_N)
    assert torch.equal(found.top_classes_NK, expected.top_classes_NK)
    torch.testing.assert_close(found.top_probabilities_NK, expected.top_probabilities_NK, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.losses_N, expected.losses_N, rtol=0, atol=1e-5)


def test_mistakes_of_a_file_cannot_be_explained(exported, images, tmp_path, capsys):
    flags = [
        "--data-set",
        "FOLDER",
        "--data-path",
        str(images),
        "--device",
        "cpu",
        "--report",
        str(tmp_path / "report"),
    ]
    assert main(["eval", str(exported[0]), *flags, "--explain"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"localvit: error: --explain: {exported[0]} is an exported file")
    assert "give the checkpoint it was made from" in line
    assert not (tmp_path / "report").exists()


def test_predictions_are_those_of_the_checkpoint(exported, checkpoint, images):
    expected = list(localvit.predict(checkpoint, images, options=OPTIONS))
    found = list(localvit.predict(exported[0], images, options=OPTIONS))
    assert [each.file for each in found] == [each.file for each in expected]
    assert [each.class_names for each in found] == [each.class_names for each in expected]
    np.testing.assert_allclose(
        [each.probabilities for each in found], [each.probabilities for each in expected], rtol=0, atol=1e-6
    )


def test_another_size_needs_a_file_that_takes_it(exported, resizing):
    assert load_model(exported[0], input_size=(32, 40)).preprocessing.input_size == (32, 40)
    with pytest.raises(ValueError, match="takes images of 24 x 24 pixels only"):
        load_model(resizing[0], input_size=(32, 40))


def test_what_has_no_effect_on_a_file_is_refused(exported, checkpoint):
    loaded = load_model(exported[0])
    with pytest.raises(ValueError, match="have no effect on it"):
        loaded.prepare(InferenceOptions(device=torch.device("cpu"), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="which has its own weights"):
        load_model(exported[0], checkpoint=checkpoint)
    with pytest.raises(ValueError, match="export the checkpoint that it was made from"):
        localvit.export(exported[0], checkpoint.with_name("again.onnx"))


def test_a_file_of_one_image_and_without_preprocessing_predicts_the_same(raw, checkpoint, images):
    expected = list(localvit.predict(checkpoint, images, options=OPTIONS))
    found = list(localvit.predict(raw[0], images, options=OPTIONS))
    assert [each.classes for each in found] == [each.classes for each in expected]
    np.testing.assert_allclose(
        [each.probabilities for each in found], [each.probabilities for each in expected], rtol=0, atol=1e-6
    )


def test_info_prints_what_a_file_carries(exported, capsys):
    assert main(["info", str(exported[0]), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class_names"] == NAMES
    assert facts["preprocessing"]["crop_pct"] == 0.8
    assert facts["input_shape"] == [None, 3, None, None]
    assert facts["about"]["metrics"] == {"acc1": 12.5}
    assert main(["info", str(exported[0])]) == 0
    text = capsys.readouterr().out
    assert "ant, bee, crow, black" in text
    assert "batch x 3 x height x width" in text


def without_metadata(path: Path, key: str | None = None, value: str = "") -> bytes:
    """The file with one entry of its metadata replaced, or without any."""
    model = onnx.load(path)
    entries = {each.key: each.value for each in model.metadata_props}
    del model.metadata_props[:]
    if key is not None:
        onnx.helper.set_model_props(model, entries | {key: value})
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: b"junk", "is not an ONNX file or is damaged"),
        (lambda path: path.read_bytes()[:5000], "is not an ONNX file or is damaged"),
        (lambda path: b"", "is not an ONNX file or is damaged"),
        (without_metadata, "was not exported by localvit"),
        (lambda path: without_metadata(path, "class_names", '["a", "b"]'), "2 class names for 5 classes"),
        (lambda path: without_metadata(path, "class_names", "[1, 2"), "has damaged metadata"),
        (lambda path: without_metadata(path, "preprocessing", "[]"), "has damaged metadata"),
        (lambda path: without_metadata(path, "dynamic", "all"), "dynamic='all'"),
        (lambda path: without_metadata(path, "localvit_export", "2"), "by another localvit"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_clear_line(exported, tmp_path, damage, match, capsys):
    path = tmp_path / "bad.onnx"
    path.write_bytes(damage(exported[0]))
    with pytest.raises(CheckpointError, match=match):
        load_model(path)
    assert main(["predict", str(path), str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no exported file at .*none\.onnx"):
        load_model(tmp_path / "none.onnx")


FREED_ON_ANOTHER_THREAD = """
import gc, os, signal, sys, threading
from pathlib import Path
from localvit.inference.exported import ExportedModel

models = [ExportedModel.open(Path(sys.argv[1]))]
thread = threading.Thread(target=lambda: (models.clear(), gc.collect()))
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: None)
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_an_openvino_model_was_freed_on_another_thread(tmp_path):
    """OpenVINO's plugin would free the memory in which the first thread handles signals: a segmentation fault."""
    pytest.importorskip("openvino")
    path = tmp_path / "model.xml"
    localvit.export(linear_model(), path, localvit.OpenVINO(), preprocessing=PREPROCESSING, class_names=NAMES)
    assert status_of(start(run_source, FREED_ON_ANOTHER_THREAD, path, err=tmp_path / "err")) == 0
