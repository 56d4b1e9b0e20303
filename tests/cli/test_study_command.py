"""`localvit study` on a few digits: what is missing is trained, once, and an interrupted run is resumed."""

import os
import signal

import pytest
import torch
from tiny import write_some_digits

from localvit.train.run_folder import read_log
from localvit_cli import main
from localvit_cli import study as command

TEXT = """
question: Does it help?
settings:
  {model: localvit_nano_patch4_32, data_set: DIGITS, batch_size: 14, ema_decay: null, workers: 0, device: cpu,
   warmup_epochs: 0, model_args: {depth: 1}}
arms:
  local: {}
  plain: {model_args: {local_blocks: []}}
baseline: plain
epochs: [1, 2]
seeds: [0]
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_some_digits(tmp_path_factory.mktemp("digits"), classes=3, train=7, val=3)


@pytest.fixture
def study(digits, tmp_path, monkeypatch, capsys):
    """A function that runs the study, in a folder of its own, with further flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(TEXT)

    def run(*flags):
        status = main(["study", "own.yaml", "--data-path", str(digits), *flags])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_the_missing_runs_are_trained_once(study, tmp_path):
    status, out, _ = study("--dry-run")
    assert status == 0
    assert "4 of 4 runs are to be trained, in about 0:" in out
    assert not (tmp_path / "runs").exists()

    status, out, err = study("--epochs", "1")
    assert status == 0, err
    folder = tmp_path / "runs" / "study-own"
    assert "| local |" in out
    assert (folder / "study.md").read_text() == out.rstrip("\n") + "\n"
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/last.safetensors")}
    assert len(before) == 2

    status, out, err = study()
    assert status == 0, err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [len(read_log(folder / f"local-e{epochs}-s0" / "log.txt")) for epochs in (1, 2)] == [1, 2]
    assert "run 3 of 4: local-e2-s0" in err
    assert "2 epochs" in out
    assert "4 of 4" not in study("--dry-run")[1]


def test_a_dry_run_decodes_the_images_once(study):
    status, out, err = study("--dry-run", "--set", "cache=true")
    assert status == 0, err
    assert err.count("cache: decoding") == 2  # for training and for validation
    assert err.count("images are decoded already") == 2
    assert ", including 0:00:0" in out
    assert out.rstrip().endswith(" for decoding images")


def test_an_interrupted_study_continues_with_the_same_bits(study, tmp_path, monkeypatch):
    flags = ("--epochs", "2", "--arms", "local")
    assert study(*flags, "--output-dir", "whole")[0] == 0
    fit = command.fit

    def interrupted(training, **arguments):
        """As if a person presses Ctrl-C after the first step of the second run."""
        if training.config.output_dir.name.startswith("plain"):
            arguments["progress"] = lambda done, note: os.kill(os.getpid(), signal.SIGINT)
        return fit(training, **arguments)

    monkeypatch.setattr(command, "fit", interrupted)
    status, _, err = study(*flags, "--output-dir", "cut")
    assert status == 130
    assert "the same command continues the study" in err
    monkeypatch.setattr(command, "fit", fit)
    status, out, err = study(*flags, "--output-dir", "cut")
    assert status == 0, err
    assert "run 2 of 2: plain-e2-s0" in err
    assert "run 1 of 2" not in err
    for run in ("local-e2-s0", "plain-e2-s0"):
        logs = [(tmp_path / name / run / "log.txt").read_text() for name in ("whole", "cut")]
        assert logs[0] == logs[1]
    assert "not finished" not in out


def test_a_run_that_fails_does_not_end_the_others(study, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "own.yaml"
    path.write_text(TEXT.replace("local: {}", "local: {lr: 1.0e+30}"))
    status, out, err = study("--epochs", "1")
    assert status == 1
    assert "error: local-e1-s0: " in err
    assert "| plain |" in out
    assert "Left out, because the last validation loss is not finite: local-e1-s0." in out
    assert "| local |" not in out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--arms", "x"), 2, "no arm 'x'"),
        (("--set", "lr=fast"), 2, "lr='fast' must be a valid number"),
        (("--set", "lr"), 2, "lr must be NAME=VALUE"),
        (("--epochs", "0"), 2, "greater than or equal to 1"),
    ],
)
def test_bad_usage(study, tmp_path, flags, status, message):
    found, out, err = study(*flags)
    assert found == status
    assert message in err
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_without_a_name_the_studies_are_listed(capsys):
    assert main(["study"]) == 0
    assert "activation" in capsys.readouterr().out
    assert main(["study", "nothing"]) == 1
    assert "there is no study 'nothing'" in capsys.readouterr().err
