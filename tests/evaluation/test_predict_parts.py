"""Predictions that several processes share, or that were interrupted, against those of one process."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import localvit
from localvit.data.folders import PathImages
from localvit.evaluation.predict_parts import PartsError, merged, open_parts, predict_own, remove_parts, wait_for_others
from localvit.inference.runner import InferenceOptions
from localvit_cli import main
from processes import run_localvit, start_group, status_of

OPTIONS = InferenceOptions(batch_size=3, workers=0, device=torch.device("cpu"))
FLAGS = ["--batch-size", "3", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, and 20 images, the seventh of which is damaged."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=3, depth=1)
    torch.nn.init.normal_(model.head.weight)
    localvit.save_checkpoint(model, root / "nano.safetensors", class_names=["ape", "bat", "cow"])
    (root / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(20):
        pixels = random.integers(0, 256, (37, 41, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:02d}.png")
    (root / "images" / "06.png").write_bytes(b"\x89PNG")
    return root


def predict(place, output, *more, status=1):
    name = output.suffix.removeprefix(".")
    arguments = ["predict", str(place / "nano.safetensors"), str(place / "images"), "--format", name]
    assert main([*arguments, "--output", str(output), *FLAGS, *more]) == status
    return output.read_bytes()


def test_the_output_of_several_processes_is_that_of_one(place, tmp_path):
    one = predict(place, tmp_path / "one.csv")
    arguments = ["predict", place / "nano.safetensors", place / "images", "--format", "csv", *FLAGS]
    out, err = tmp_path / "out", tmp_path / "err"
    group = start_group(3, run_localvit, *arguments, "--output", tmp_path / "all.csv", out=out, err=err)
    # Only the first process says that an image is damaged: torchrun would stop the others at the first other status.
    assert [status_of(each) for each in group] == [1, 0, 0], err.read_text()
    assert (tmp_path / "all.csv").read_bytes() == one
    assert {path.name for path in tmp_path.iterdir()} == {"one.csv", "all.csv", "out", "err"}
    assert "1 of 20 images have no prediction" in err.read_text()


class Stopped(Exception):
    """The end of a process in the middle of a batch."""


def open_and_stop(place, folder, after):
    """Predict `after` images and stop, as a killed process does, with half a line written."""
    parts = open_parts(folder, PathImages([place / "images"]), 3, JOB)
    seen = []

    def count(prediction):
        seen.append(prediction.file)
        if len(seen) > after:
            raise Stopped

    with pytest.raises(Stopped):
        predict_own(parts, place / "nano.safetensors", OPTIONS, topk=3, progress=count)
    with parts.file.open("a") as file:
        file.write('{"batch": 5, "predic')
    return parts


JOB = {"topk": 3}


def test_a_stopped_run_computes_only_what_is_missing(place, tmp_path):
    expected = list(localvit.predict(place / "nano.safetensors", place / "images", options=OPTIONS, topk=3))
    images = PathImages([place / "images"])
    open_and_stop(place, tmp_path / "parts", after=7)
    again = open_and_stop(place, tmp_path / "parts", after=4)
    assert list(again.missing) == [2, 3, 4, 5, 6]  # of seven batches, two were complete
    last = open_parts(tmp_path / "parts", images, 3, JOB)
    assert list(last.missing) == [3, 4, 5, 6]
    with pytest.raises(PartsError, match="lacks batch 3"):
        list(merged(last))
    seen = []
    predict_own(last, place / "nano.safetensors", OPTIONS, topk=3, progress=lambda each: seen.append(each.file))
    assert seen == [images.name(index) for index in range(9, 20)]
    assert list(merged(last)) == expected
    remove_parts(last)
    assert not (tmp_path / "parts").exists()


def test_the_command_finishes_an_interrupted_run(place, tmp_path, capsys, monkeypatch):
    one = predict(place, tmp_path / "one.jsonl")

    def stop(parts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("localvit_cli.predict.shares_images", lambda output: True)
        patch.setattr("localvit_cli.predict_parts.wait_for_others", stop)
        arguments = ["predict", str(place / "nano.safetensors"), str(place / "images"), "--format", "jsonl"]
        assert main([*arguments, "--output", str(tmp_path / "two.jsonl"), *FLAGS]) == 130
    assert (tmp_path / "two.jsonl.parts").is_dir()
    assert not (tmp_path / "two.jsonl").exists()
    capsys.readouterr()
    assert predict(place, tmp_path / "two.jsonl") == one
    assert "20 of 20 images were done before" in capsys.readouterr().err
    assert not (tmp_path / "two.jsonl.parts").exists()


def test_the_first_process_does_not_wait_for_one_that_failed(place, tmp_path):
    parts = replace(open_parts(tmp_path / "parts", PathImages([place / "images"]), 3, JOB), world_size=2)

    def fail(prediction):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        predict_own(replace(parts, rank=1), place / "nano.safetensors", OPTIONS, topk=3, progress=fail)
    predict_own(parts, place / "nano.safetensors", OPTIONS, topk=3)
    with pytest.raises(PartsError, match="process 1 of 2 failed: OSError: disk full"):
        wait_for_others(parts)
    last = open_parts(tmp_path / "parts", PathImages([place / "images"]), 3, JOB)
    assert list(last.missing) == [1, 3, 5]
    predict_own(last, place / "nano.safetensors", OPTIONS, topk=3)
    wait_for_others(last)
    remove_parts(last)
    assert not (tmp_path / "parts").exists()


def test_parts_of_another_run_are_refused(place, tmp_path):
    images = PathImages([place / "images"])
    open_parts(tmp_path / "parts", images, 3, JOB)
    for changed, what in (
        ((images, 4, JOB), "batch_size"),
        ((images, 3, {"topk": 2}), "topk"),
        ((PathImages([place / "images" / "01.png"] * 20), 3, JOB), "names"),
    ):
        with pytest.raises(PartsError, match=f"parts of another run, which differs in {what}"):
            open_parts(tmp_path / "parts", *changed)


def test_several_processes_need_a_file(place, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["predict", str(place / "nano.safetensors"), str(place / "images")]) == 2
    assert "give a file with --output FILE" in capsys.readouterr().err


def test_parquet_has_the_rows_of_jsonl(place, tmp_path, capsys, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")
    predict(place, tmp_path / "one.parquet")
    lines = predict(place, tmp_path / "one.jsonl").decode().splitlines()
    assert parquet.read_table(tmp_path / "one.parquet").to_pylist() == [json.loads(line) for line in lines]
    capsys.readouterr()
    arguments = ["predict", str(place / "nano.safetensors"), str(place / "images"), "--format", "parquet"]
    assert main(arguments) == 2
    assert "give a file with --output" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main([*arguments, "--output", str(tmp_path / "two.parquet")]) == 1
    assert "pip install 'localvit[parquet]'" in capsys.readouterr().err
