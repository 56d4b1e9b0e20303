"""The commands and snippets of docs/many_images.md, run as they stand, on a few images."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import localvit
from localvit_cli import main
from processes import run_localvit, start_group, status_of
from tar_sets import write_set

DOCUMENT = (Path(__file__).parents[2] / "docs" / "many_images.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the document names."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=3, depth=1)
    torch.nn.init.normal_(model.head.weight)
    localvit.save_checkpoint(model, "best.safetensors", class_names=["ape", "bat", "cow"])
    write_set(tmp_path / "shards")
    Path("images").mkdir()
    random = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(random.integers(0, 256, (37, 41, 3), dtype=np.uint8)).save(f"images/{number}.png")
    return tmp_path


def test_the_commands(place, capsys):
    """With 2 processes in the place of 8."""
    pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    pytest.importorskip("webdataset", reason="webdataset is an extra")
    commands = [shlex.split(block) for kind, block in BLOCKS if kind == "bash"]
    assert [words[:6] for words in commands] == [
        ["torchrun", "--nproc-per-node", "8", "-m", "localvit", name] for name in ("predict", "eval")
    ]
    for words in commands:
        flags = [*words[5:], "--device", "cpu", "--workers", "0"]
        group = start_group(2, run_localvit, *flags, out=place / "out", err=place / "err")
        assert [status_of(each) for each in group] == [0, 0], (place / "err").read_text()
    assert (place / "out").read_text().startswith("* Acc@1 ")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table("predictions.parquet").num_rows == 7


def test_the_snippets_in_python_and_with_ray(place, capfd, monkeypatch):
    python = [block for kind, block in BLOCKS if kind == "python"]
    names: dict = {}
    exec(compile(python[0], "many_images.md", "exec"), names)
    assert main(["predict", "best.safetensors", "images", "--format", "jsonl", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    expected = {Path(row["file"]).name: row["predictions"][0] for row in rows}
    exec(compile(python[1], "many_images.md", "exec"), names)
    paths = sorted(Path("images").iterdir())
    batch = {
        "image": [np.asarray(Image.open(path).convert("RGB")) for path in paths],
        "path": np.array([str(path) for path in paths]),
    }
    found = names["Classifier"]("best.safetensors")(batch)
    for path, name, probability in zip(found["path"], found["class"], found["probability"], strict=True):
        assert (name, float(probability)) == (
            expected[Path(path).name]["name"],
            pytest.approx(expected[Path(path).name]["probability"], rel=1e-5),
        )
    ray = pytest.importorskip("ray", reason="Ray is not installed; the class above has run without it")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", _node_ip_address="127.0.0.1")
    try:
        absolute = python[2].replace('"images"', repr(str(place / "images")))
        absolute = absolute.replace('"best.safetensors"', repr(str(place / "best.safetensors")))
        exec(compile(absolute.replace('"predictions"', repr(str(place / "predictions"))), "ray", "exec"), names)
    finally:
        ray.shutdown()
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(place / "predictions").to_pylist()
    assert {Path(row["path"]).name: row["class"] for row in table} == {
        name: best["name"] for name, best in expected.items()
    }
