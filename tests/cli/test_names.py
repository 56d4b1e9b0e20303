"""Folders, files and classes whose names are not valid UTF-8 or contain control characters, through every command."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localvit.checkpoints import read_checkpoint
from localvit.train.recipe import read_settings
from localvit_cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems accept no such names")

LATIN_1 = os.fsdecode(b"caf\xe9")
SETTINGS = [
    *("--model", "localvit_nano_patch4_32", "--model-args", "depth=1", "--data-set", "FOLDER", "--epochs", "1"),
    *("--batch-size", "4", "--no-repeated-aug", "--warmup-epochs", "0", "--workers", "0", "--device", "cpu"),
]
CLASSES = [LATIN_1, "[red]x\x1b[31m\r", "中\nb"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images in `images`, and the trained run in `run`, in a folder that is not valid UTF-8 either."""
    root = tmp_path_factory.mktemp("names") / LATIN_1
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}{LATIN_1}\x07.png")
    paths = ["--data-path", str(root / "images"), "--output-dir", str(root / "run")]
    assert main(["train", *SETTINGS, *paths]) == 0
    return root


def clean(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_training_writes_all_its_files(folder):
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"best.safetensors", "last.safetensors", "checkpoint.pth", "config.yaml", "log.txt"} <= names
    assert {"summary.md", "metrics.csv", "curves.png"} <= names
    assert read_settings(folder / "run" / "config.yaml")["output_dir"] == str(folder / "run")
    assert read_checkpoint(folder / "run" / "best.safetensors").class_names == sorted(CLASSES)
    assert "caf\\udce9" in (folder / "run" / "summary.md").read_text(encoding="utf-8")
    assert main(["train", "--resume", "auto", "--output-dir", str(folder / "run"), "--epochs", "1"]) == 0


def test_tensorboard_refuses_before_training_what_it_cannot_write(folder, capsys):
    paths = ["--data-path", str(folder / "images"), "--output-dir", str(folder / "board")]
    assert main(["train", *SETTINGS, *paths, "--tensorboard"]) == 1
    assert "because that path is not valid UTF-8: choose another --output-dir" in capsys.readouterr().err


def test_evaluation(folder, capsys):
    model, report = folder / "run" / "best.safetensors", folder / "report"
    flags = ["--data-path", str(folder / "images"), "--workers", "0", "--device", "cpu", "--report", str(report)]
    assert main(["eval", str(model), *flags, "--include-trained"]) == 0
    printed = capsys.readouterr()
    assert clean(printed.out + printed.err)
    with (report / "per_class.csv").open(encoding="utf-8", newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert names == [name.encode(errors="backslashreplace").decode() for name in sorted(CLASSES)]
    assert json.loads((report / "results.json").read_text(encoding="utf-8"))["data_path"] == str(folder / "images")
    assert "caf\\udce9" in (report / "report.html").read_text(encoding="utf-8")


def test_prediction(folder, capsys):
    model, output = folder / "run" / "best.safetensors", folder / f"{LATIN_1}.jsonl"
    flags = [str(folder / "images"), "--workers", "0", "--device", "cpu"]
    assert main(["predict", str(model), *flags, "--format", "jsonl", "--output", str(output)]) == 0
    files = [json.loads(line)["file"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert sorted(files) == sorted(str(path) for path in (folder / "images").glob("*/*"))
    assert main(["predict", str(model), *flags]) == 0
    printed = capsys.readouterr()
    assert clean(printed.out + printed.err)


def test_commands_that_describe(folder, capsys):
    run = folder / "run"
    for arguments in (
        ["info", str(run / "best.safetensors")],
        ["compare", str(run)],
        ["compare", str(run), "--plot", str(folder / "plot.svg")],
        ["check-data", str(folder / "images"), "--workers", "0"],
        ["info", str(folder / "missing\x1b.safetensors")],
    ):
        main(arguments)
        printed = capsys.readouterr()
        assert clean(printed.out + printed.err), arguments
        assert "Traceback" not in printed.err
    assert (folder / "plot.svg").exists()
