"""`localvit export`: the file, the report, and one clear line for what cannot be done."""

import json
import sys

import numpy as np
import pytest
import torch
from exported_files import expected_probabilities, noise, run

from localvit_cli import main

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_the_command_writes_the_file_and_prints_its_report(checkpoint, tmp_path, capsys):
    path = tmp_path / "made" / "model.onnx"
    arguments = ["export", str(checkpoint), "--format", "onnx", "--output", str(path), "--dynamic", "none"]
    assert main([*arguments, "--include", "preprocessing", "--input-type", "float32"]) == 0
    out = capsys.readouterr().out
    assert "1 x 24 x 24" in out
    report = json.loads(path.with_name("model.onnx.json").read_text())
    assert report["settings"]["include"] == ["preprocessing"]
    assert report["max_rel"] < 1e-5
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["output"], facts["input_shape"]) == ("logits", [1, 3, 24, 24])
    assert "/" not in facts["source"]
    pixels = noise(1, 3, 24, 24)
    logits = torch.from_numpy(run(path, np.float32(pixels) / 255)).double()
    np.testing.assert_allclose(logits.softmax(1), expected_probabilities(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--raw", "--include", "softmax"], "--raw includes nothing"),
        (["--include", "normalize"], "include='normalize'"),
        (["--include", ","], "--include names nothing"),
        (["--include", "resize", "--dynamic", "size"], "contradict"),
        (["--format", "pt2", "--opset", "20"], "--opset has no effect with --format pt2"),
        (["--opset", "7"], "opset=7"),
        (["--output", "model.xml"], "must end in .onnx"),
    ],
)
def test_bad_usage_is_one_line_with_status_2(checkpoint, arguments, words, capsys):
    assert main(["export", str(checkpoint), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_missing_package_is_one_line_that_says_what_to_install(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "model.onnx")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "needs onnxscript" in line
    assert 'pip install "localvit[onnx]"' in line
    assert list(tmp_path.iterdir()) == []
