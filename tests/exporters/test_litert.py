"""A LiteRT file computes what the model computes, carries all it needs, and says what it cannot be."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from exported_files import MEAN, NAMES, STD, expected_probabilities, noise

import localvit
from localvit.exporters import ExportReport, LiteRT
from localvit.inference.quiet import without_messages
from localvit.inference.runner import load_model
from localvit.utils.weight_files import CheckpointError
from localvit_cli import main


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory) -> tuple[Path, ExportReport]:
    """The checkpoint as a .tflite file."""
    with without_messages():
        pytest.importorskip("litert_torch")
    path = tmp_path_factory.mktemp("litert") / "tiny.tflite"
    return path, localvit.export(checkpoint, path, LiteRT())


def test_the_file_computes_probabilities_of_pixels(written):
    """Run by LiteRT alone, by the name of its input."""
    from ai_edge_litert.interpreter import Interpreter

    path, report = written
    assert report.max_rel < 1e-5
    assert report.runtime.startswith("LiteRT ")
    assert {each.name for each in path.parent.iterdir()} == {"tiny.tflite", "tiny.tflite.json"}
    interpreter = Interpreter(model_path=str(path))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["probabilities"]}}
    run = interpreter.get_signature_runner("serving_default")
    for seed in range(3):
        images = noise(1, 3, 24, 24, seed=seed)
        found = run(images=images)["probabilities"]
        np.testing.assert_allclose(found, expected_probabilities(images), rtol=0, atol=1e-6)


def test_the_archive_at_its_end_says_classes_preprocessing_and_origin(written):
    path, _ = written
    with zipfile.ZipFile(path) as archive:
        texts = json.loads(archive.read("localvit.json"))
        assert archive.read("labels.txt").decode().splitlines() == NAMES
    assert json.loads(texts["class_names"]) == NAMES
    preprocessing = json.loads(texts["preprocessing"])
    assert (preprocessing["mean"], preprocessing["std"]) == (list(MEAN), list(STD))
    assert (texts["output"], texts["dynamic"]) == ("probabilities", "none")


def test_a_batch_of_images_is_run_one_by_one(written):
    path, _ = written
    loaded = load_model(path)
    assert loaded.class_names == NAMES
    images = noise(3, 3, 24, 24)
    np.testing.assert_allclose(loaded.model.run(images), expected_probabilities(images), rtol=0, atol=1e-6)


def test_a_damaged_file_is_one_error(written, tmp_path):
    path, _ = written
    cut = tmp_path / "cut.tflite"
    whole = path.read_bytes()
    for contents in (b"", b"nothing", whole[:1000], whole[: len(whole) // 2]):
        cut.write_bytes(contents)
        with pytest.raises(CheckpointError, match="is not a LiteRT file or is damaged"):
            load_model(cut)
    with zipfile.ZipFile(path) as archive:
        start = min(info.header_offset for info in archive.infolist())
    cut.write_bytes(whole[:start])
    with pytest.raises(CheckpointError, match="was not exported by localvit"):
        load_model(cut)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dynamic", "batch"], "dynamic='batch' is not written as litert"),
        (["--precision", "float16"], "precision='float16' is not written as litert"),
        (["--output", "model.lite"], "must end in .tflite"),
    ],
)
def test_what_it_cannot_be_is_one_line(checkpoint, options, words, capsys):
    assert main(["export", str(checkpoint), "--format", "litert", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_without_the_runtime_one_line_says_what_to_install(checkpoint, tmp_path, capsys, monkeypatch):
    for module in ("ai_edge_litert", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    path = tmp_path / "model.tflite"
    assert main(["export", str(checkpoint), "--format", "litert", "--output", str(path)]) == 1
    path.write_bytes(b"a file")
    assert main(["info", str(path)]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert 'pip install "localvit[litert]"' in line


def test_without_the_converter_one_line_says_what_to_install(monkeypatch):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(ImportError, match="pip install litert-torch, then localvit again"):
        LiteRT().check_installed()
