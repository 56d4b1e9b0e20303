"""The README's commands and snippets, run unchanged and in order, in a folder with the files that they name.

They run in this process, because most of a short command's time is the import of torch. `tests/cli/test_start.py` and
`tests/train/test_processes.py` start them as a shell and torchrun do.
"""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_some_digits

import localvit_cli
from localvit_cli.published import parse as parse_published
from localvit_cli.published import to_config
from localvit_cli.train import parse
from published import published_state

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def make_files(folder: Path) -> None:
    """A stand-in for a released checkpoint, two synsets of an ImageNet, some digits, and images of three classes."""
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
        for number in range(5 if "train" in name else 2):
            Image.fromarray(rng.integers(0, 256, (37, 41, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    (folder / "cache" / "localvit").mkdir(parents=True)
    write_some_digits(folder, classes=10, train=7, val=2).rename(folder / "cache" / "localvit" / "digits")


def run_commands(block: str) -> None:
    for line in filter(None, map(str.strip, block.splitlines())):
        words = shlex.split(line, comments=True)
        if words[0] in ("make", "source"):  # `make` runs this suite and the demo, which has tests of its own
            continue
        if words[0] == "torchrun":  # eight GPUs and 300 epochs: here, that the flags are right
            check_flags(words[words.index("main.py" if "main.py" in words else "localvit") :])
            continue
        if "finetune" in words:
            words += ["--epochs", "1", "--batch-size", "4"]
        assert exit_status(words) == 0, line


def exit_status(words: list[str]) -> int:
    """That of `localvit ...` or `python main.py ...`."""
    try:
        if words[0] == "localvit":
            return localvit_cli.main(words[1:])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    raise AssertionError(f"{words} did not exit")


def check_flags(words: list[str]) -> None:
    if words[0] == "main.py":
        config = to_config(parse_published(words[1:]))
    else:
        assert words[1] == "train"
        config = parse(words[2:]).to_config()
    assert (config.batch_size, config.epochs) == (128, 300)


def test_every_block_runs_in_order(tmp_path, monkeypatch):
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    names: dict = {}
    kinds = []
    for kind, block in BLOCKS:
        if kind == "bash":
            run_commands(block)
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
