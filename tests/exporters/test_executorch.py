"""An ExecuTorch file computes what the model computes, carries all it needs, and says what it cannot be."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_files import MEAN, NAMES, STD, expected_probabilities, noise

import localvit
from localvit.bench.prepare import BenchOptions
from localvit.exporters import ExecuTorch, ExportReport
from localvit.inference.runner import load_model
from localvit.utils.weight_files import CheckpointError
from localvit_cli import main
from localvit_cli.bench_runtimes import prepare_all


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory) -> tuple[Path, ExportReport]:
    """The checkpoint as a .pte file; lowering takes 20 seconds."""
    pytest.importorskip("executorch.runtime")
    path = tmp_path_factory.mktemp("executorch") / "tiny.pte"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])  # as outside pytest
        report = localvit.export(checkpoint, path, ExecuTorch())
        assert logging.root.handlers == []
    return path, report


def test_the_file_computes_probabilities_of_pixels_with_xnnpack(written):
    """Run by ExecuTorch alone, one image a call."""
    from executorch.runtime import Runtime

    path, report = written
    assert report.max_rel < 1e-5
    assert report.runtime.startswith("ExecuTorch ")
    assert {each.name for each in path.parent.iterdir()} == {"tiny.pte", "tiny.pte.json"}
    method = Runtime.get().load_program(path).load_method("forward")
    for seed in range(3):
        images = noise(1, 3, 24, 24, seed=seed)
        [found] = method.execute([torch.from_numpy(images)])
        np.testing.assert_allclose(found.numpy(), expected_probabilities(images), rtol=0, atol=1e-6)
    assert b"XnnpackBackend" in path.read_bytes()


def test_its_method_localvit_returns_classes_preprocessing_and_origin(written):
    from executorch.runtime import Runtime

    path, _ = written
    [text] = Runtime.get().load_program(path).load_method("localvit").execute([])
    texts = json.loads(text)
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


def test_the_file_is_measured_in_its_runtime(written, tmp_path):
    path, _ = written
    options = BenchOptions(device=torch.device("cpu"))
    [model] = prepare_all([str(path)], None, ["torch"], options, None, tmp_path)
    assert model.runtime.startswith("ExecuTorch ")


def test_a_damaged_file_is_one_error(written, tmp_path, capfd):
    path, _ = written
    cut = tmp_path / "cut.pte"
    whole = path.read_bytes()
    no_method = whole.replace(b"forward", b"forwerd")
    for contents in (b"", b"nothing", whole[:1000], whole[: len(whole) // 2], no_method):
        cut.write_bytes(contents)
        with pytest.raises(CheckpointError, match="is not an ExecuTorch file or is damaged"):
            load_model(cut)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dynamic", "batch"], "dynamic='batch' is not written as executorch"),
        (["--include", "resize"], "include='resize' is not written as executorch"),
        (["--precision", "float16"], "precision='float16' is not written as executorch"),
        (["--output", "model.onnx"], "must end in .pte"),
    ],
)
def test_what_it_cannot_be_is_one_line(checkpoint, options, words, capsys):
    assert main(["export", str(checkpoint), "--format", "executorch", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_without_the_package_one_line_says_what_to_install(checkpoint, tmp_path, capsys, monkeypatch):
    for module in ("executorch", "executorch.exir", "executorch.runtime"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    path = tmp_path / "model.pte"
    assert main(["export", str(checkpoint), "--format", "executorch", "--output", str(path)]) == 1
    path.write_bytes(b"a file")
    assert main(["info", str(path)]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert 'pip install "localvit[executorch]"' in line
