"""`localvit train` as a person meets it: a rehearsal, an interruption, going on, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny import tiny_config, write_some_digits

from localvit_cli import main


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_some_digits(tmp_path_factory.mktemp("digits"), classes=3, train=13, val=3)


def settings(folder, data, **changes):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tiny_config(data, folder / "run", **changes).to_dict()))
    return str(path)


def test_a_dry_run_says_what_a_run_would_be_and_leaves_nothing(digits, tmp_path, capsys):
    told = settings(tmp_path, digits, batch_size=6, grad_accum=2, epochs=7, lr=0.1)
    assert main(["train", "--config", told, "--dry-run"]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name: value.strip() for name, value in shown.items()}
    assert shown["images"].startswith("39 to train on, 9")
    assert shown["images a step"].startswith("12 ")
    assert shown["steps"].startswith("21 ")  # 39 images are 3 steps of 12
    assert float(shown["learning rate"].split()[0]) == pytest.approx(0.1 * 12 / 512, rel=1e-2)
    assert shown["model"].startswith("localvit_nano_patch4_32, 730,")
    assert {"time a step", "time in all", "memory", "runs on"} <= shown.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


def test_interrupted_it_leaves_and_goes_on_under_its_own_settings(digits, tmp_path, capsys):
    """The folder alone is enough to go on."""
    told = settings(tmp_path, digits, epochs=40)
    run = subprocess.Popen(
        [sys.executable, "-m", "localvit", "train", "--config", told],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "log.txt"
    while run.poll() is None and not log.exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert (out, "Traceback" in err) == ("", False)
    assert err.splitlines()[-1].startswith("localvit: stopped in epoch ")
    done = len(log.read_text().splitlines())

    assert main(["train", "--resume", "auto", "--output-dir", str(tmp_path / "run"), "--epochs", str(done + 1)]) == 0
    told = capsys.readouterr()
    assert f"epochs={done + 1}, where the run began with 40" in told.err
    assert told.out.startswith("Acc@1 ")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(done + 1))
    assert (tmp_path / "run" / "summary.md").exists()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--lr", "0"], 2, "lr=0.0 must be above 0"),
        (["--recipe", "nothing"], 2, "no recipe is called 'nothing'"),
        (["--model-args", "depth"], 2, "NAME=VALUE"),
        (["--model-args", "depth_wise=false"], 1, "depth_wise"),
        (["--localize", "kernel_size"], 2, "--localize kernel_size must be NAME=VALUE"),
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
def test_refused_in_a_line(digits, tmp_path, monkeypatch, capsys, flags, status, words):
    told = settings(tmp_path, digits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "--config", told, *flags]) == status
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
    # Nothing in the folder stands in the way of trying again.
    assert main(["train", "--config", told, "--epochs", "1"]) == 0
