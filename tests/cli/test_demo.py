"""The demo, shortened to a network of two blocks, five digits and three epochs. `make demo` runs it in full."""

import json
import os
import signal
from contextlib import contextmanager

import pytest
from PIL import Image
from tiny import write_some_digits

from localvit.checkpoints import read_checkpoint
from localvit.models.registry import packaged_weights
from localvit.train.config import TrainConfig
from localvit.train.recipe import read_recipe
from localvit_cli.console import log_to_stderr
from localvit_cli.demo import PACKAGED, run_demo


def test_the_demo_trains_and_writes_the_files_that_it_names(tmp_path, capsys):
    digits = write_some_digits(tmp_path, classes=5, train=40, val=20)
    shortened = {"data_path": digits, "output_dir": tmp_path / "run", "epochs": 3, "batch_size": 8, "workers": 0}
    own = shortened | {"lr": 0.032, "warmup_lr": 0.001, "device": "cpu", "model_args": {"depth": 2}}
    with log_to_stderr():
        acc1 = run_demo(TrainConfig(**(read_recipe("digits") | own)))
    # Chance is 20, with a deviation of 4 on 100 images.
    assert acc1 >= 40

    printed = capsys.readouterr()
    run = tmp_path / "run"
    for path in (run / "last.safetensors", run / "curves.png", run / "report" / "report.html"):
        assert str(path) in printed.out
        assert path.exists()
    assert json.loads((run / "report" / "results.json").read_text())["acc1"] == acc1
    assert f"Acc@1 {acc1:.3f}" in printed.out
    assert printed.out.endswith(f"localvit predict {PACKAGED} PHOTO\n")
    assert packaged_weights(PACKAGED)
    assert read_checkpoint(run / "last.safetensors").class_names == ["0", "1", "2", "3", "4"]
    with Image.open(run / "curves.png") as image:
        image.verify()
    assert "images" in printed.err  # progress lines


def test_an_interrupted_demo_stops(tmp_path, capsys, monkeypatch):
    """After the training is stopped, nothing is evaluated and no file is named."""
    digits = write_some_digits(tmp_path, classes=10, train=4, val=2)
    shortened = {"data_path": digits, "output_dir": tmp_path / "run", "epochs": 3, "batch_size": 8, "workers": 0}
    monkeypatch.setattr("localvit_cli.train.progress", _interrupting_progress)
    with pytest.raises(SystemExit) as stop:
        run_demo(TrainConfig(**(read_recipe("digits") | shortened | {"device": "cpu"})))
    assert stop.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().out == ""


@contextmanager
def _interrupting_progress(*_: object):
    """Ctrl-C after the first step."""
    interruptions = iter([signal.SIGINT])

    def advance(done: int, note: str = "") -> None:
        for number in interruptions:
            os.kill(os.getpid(), number)

    yield advance
