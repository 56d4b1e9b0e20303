"""The README's commands and snippets, run unchanged and in order, in a folder with the files that they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localvit_cli.published import parse as parse_published
from localvit_cli.published import to_config
from localvit_cli.train import parse
from published import published_state

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "localvit": [sys.executable, "-m", "localvit"],
    "python": [sys.executable],
}


def make_files(folder: Path) -> None:
    """A stand-in for a released checkpoint, two synsets of an ImageNet, and a user's images of three classes."""
    torch.save({"model": published_state("localvit_tiny_mlp4_act3_r192")}, folder / "localvit_t.pth")
    downloaded = folder / "torch" / "hub" / "checkpoints"  # where a download would put it
    downloaded.mkdir(parents=True)
    (downloaded / "localvit_t.pth").symlink_to(folder / "localvit_t.pth")
    (folder / "main.py").symlink_to(ROOT / "main.py")
    rng = np.random.default_rng(0)
    classes = [f"imagenet/val/{synset}" for synset in ("n01440764", "n01484850")]
    classes += [f"images/{split}/{name}" for split in ("train", "val") for name in ("ape", "bat", "cow")]
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(24 if "train" in name else 2):
            Image.fromarray(rng.integers(0, 256, (37, 41, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")


def run_commands(block: str, folder: Path) -> None:
    for line in filter(None, map(str.strip, block.splitlines())):
        words = shlex.split(line, comments=True)
        if words[0] in ("make", "source"):  # `make` runs this suite and the demo, which has tests of its own
            continue
        if words[0] == "torchrun":  # eight GPUs and 300 epochs: here, that the flags are right
            check_flags(words[words.index("main.py" if "main.py" in words else "localvit") :])
            continue
        command = PROGRAMS[words[0]] + words[1:]
        if "finetune" in words:
            command += ["--epochs", "1", "--batch-size", "8"]
        own = {"XDG_CACHE_HOME": str(folder / "cache"), "TORCH_HOME": str(folder / "torch"), "OMP_NUM_THREADS": "1"}
        environment = os.environ | own
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def check_flags(words: list[str]) -> None:
    if words[0] == "main.py":
        config = to_config(parse_published(words[1:]))
    else:
        assert words[1] == "train"
        config = parse(words[2:]).to_config()
    assert (config.batch_size, config.epochs) == (128, 300)


@pytest.mark.timeout(900)  # twenty commands, each of which imports torch
def test_every_block_runs_in_order(tmp_path, monkeypatch):
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    kinds = []
    for kind, block in BLOCKS:
        if kind == "bash":
            run_commands(block, tmp_path)
        elif kind == "python":
            exec(compile(block, "README.md", "exec"), names)
        kinds.append(kind)
    assert kinds.count("bash") >= 3
    assert kinds.count("python") >= 4
    assert names["logits"].shape == (2, 10)
    assert names["y_BCHW"].shape == (2, 192, 14, 20)
    assert names["x_BNC"].shape == (2, 281, 192)
    assert names["checkpoint"].class_names == ["ape", "bat", "cow"]
    for written in ("report/report.html", "predictions.csv", "mine.pth", "runs.png", "runs/mine/summary.md"):
        assert (tmp_path / written).is_file()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
