"""`localvit train`: a dry run, an interruption and a resume, and errors."""

import json
import os
import signal
import sys
import time

import pytest
import yaml
from tiny import tiny_config, write_some_digits

from localvit_cli import main
from processes import run_localvit, start, status_of


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_some_digits(tmp_path_factory.mktemp("digits"), classes=3, train=13, val=3)


def settings(folder, data, **changes):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tiny_config(data, folder / "run", **changes).to_dict()))
    return str(path)


def test_a_dry_run_describes_the_run_and_writes_nothing(digits, tmp_path, capsys):
    config = settings(tmp_path, digits, batch_size=6, grad_accum=2, epochs=7, lr=0.1)
    assert main(["train", "--config", config, "--dry-run"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["images"].startswith("39 for training, 9")
    assert rows["images per step"].startswith("12 ")
    assert rows["steps"].startswith("21 ")  # 39 images are 3 steps of 12
    assert float(rows["peak learning rate"]) == pytest.approx(0.1 * 12 / 512, rel=1e-2)
    assert rows["model"].startswith("localvit_nano_patch4_32, 251,147 of 251,147 parameters")  # of two blocks
    assert {"time per step", "total time", "peak memory", "device"} <= rows.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_an_interrupted_run_resumes_with_its_own_settings(digits, tmp_path, capsys):
    """The command to resume names only the folder."""
    config = settings(tmp_path, digits, epochs=40)
    out, err = tmp_path / "out", tmp_path / "err"
    run = start(run_localvit, "train", "--config", config, out=out, err=err)
    log = tmp_path / "run" / "log.txt"
    while run.is_alive() and not log.exists():
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGINT)
    assert status_of(run) == 130
    assert (out.read_text(), "Traceback" in err.read_text()) == ("", False)
    assert err.read_text().splitlines()[-1].startswith("localvit: stopped in epoch ")
    done = len(log.read_text().splitlines())

    assert main(["train", "--resume", "auto", "--output-dir", str(tmp_path / "run"), "--epochs", str(done + 1)]) == 0
    printed = capsys.readouterr()
    assert f"epochs={done + 1}; the run started with 40" in printed.err
    assert printed.out.startswith("Acc@1 ")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(done + 1))
    assert (tmp_path / "run" / "summary.md").exists()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--lr", "0"], 2, "lr=0.0 must be greater than 0"),
        (["--recipe", "nothing"], 2, "there is no recipe 'nothing'"),
        (["--model-args", "depth_wise=false"], 1, "depth_wise"),
        (["--localize", "trainable=locality"], 2, "finetune must name"),
        (["--localize"], 1, "has locality already"),
        (["--resume", "nowhere.pth"], 1, "no checkpoint at nowhere.pth"),
        (["--finetune", "nowhere.pth"], 1, "nowhere.pth"),
        (["--freeze", "block.*"], 1, "freeze=block.* matches no parameter"),
        (["--distillation", "hard"], 1, "distilled=true"),
        (["--wandb", "project"], 1, "wandb"),
        (["--batch-size", "40"], 1, "batch_size=40 is more than the 39 images"),
    ],
)
def test_errors_are_one_line(digits, tmp_path, monkeypatch, capsys, flags, status, words):
    config = settings(tmp_path, digits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "--config", config, *flags]) == status
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
    # The folder can be used for another try.
    assert main(["train", "--config", config, "--epochs", "1"]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-args", "depth"], "depth must be NAME=VALUE"),
        (["--localize", "kernel_size"], "kernel_size must be NAME=VALUE"),
        (["--lr", "high"], "--lr"),
        (["--learning-rate", "1"], "--learning-rate"),
    ],
)
def test_flags_that_cannot_be_read(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
