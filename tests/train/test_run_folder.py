"""A run's folder belongs to one run and one process; a person's files in it stay; it holds what is recommended."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from torch import nn

from localvit.checkpoints import read_checkpoint
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.dry_run import dry_run
from localvit.train.loop import Stopped, fit
from localvit.train.run_folder import STATE, newest_state, read_log, read_state, save_state
from localvit.utils import file_lock
from localvit.utils.file_lock import locked
from localvit.utils.weight_files import CheckpointError
from localvit_cli.demo import run_demo
from localvit_cli.train import parse, run_training

SETTINGS = {"model_args": {"depth": 1}, "ema_decay": None}


@pytest.fixture(scope="module")
def finished(tiny_digits, tmp_path_factory):
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    fit(build(tiny_config(tiny_digits, folder, **SETTINGS)))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Interrupting(nn.Module):
    """A loss that sends signals to this process, at its first call."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = numbers

    def forward(self, images_BCHW, logits_BM, targets):
        for number in self.numbers:
            os.kill(os.getpid(), number)
        self.numbers = ()
        return nn.functional.cross_entropy(logits_BM, targets)


def test_another_run_is_not_replaced(finished, tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "other", **SETTINGS, epochs=1, lr=0.5)
    fit(build(config))
    before = contents(tmp_path / "other")
    message = f"{tmp_path / 'other'} contains another run: resume it with --resume auto"
    for resume in (str(finished / STATE), None):
        with pytest.raises(FileExistsError, match=message):
            build(tiny_config(tiny_digits, tmp_path / "other", **SETTINGS), resume=resume)
    for name in (STATE, "checkpoint.1.pth", "log.txt", "last.safetensors"):  # the best model is what matters most
        (tmp_path / "other" / name).unlink()
    for resume in (str(finished / STATE), None):
        with pytest.raises(FileExistsError, match="contains files of a run but no checkpoint"):
            build(tiny_config(tiny_digits, tmp_path / "other", **SETTINGS), resume=resume)
    assert (tmp_path / "other" / "best.safetensors").read_bytes() == before["best.safetensors"]


def test_a_folder_with_a_log_only_is_not_to_be_resumed(tiny_digits, tmp_path):
    (tmp_path / "log.txt").write_text("mine")
    for resume in (None, "auto"):
        with pytest.raises(FileExistsError, match="files of a run but no checkpoint to resume from: choose another"):
            build(tiny_config(tiny_digits, tmp_path, **SETTINGS), resume=resume)
    assert contents(tmp_path) == {"log.txt": b"mine"}


def test_a_run_resumes_in_its_own_folder_from_its_older_state_or_a_copy(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", **SETTINGS)
    fit(build(config))
    expected = (tmp_path / "run" / "log.txt").read_text()
    (tmp_path / "copy.pth").write_bytes((tmp_path / "run" / "checkpoint.1.pth").read_bytes())
    for file in (tmp_path / "run" / "checkpoint.1.pth", tmp_path / "copy.pth"):
        fit(build(config, resume=str(file)))
        assert (tmp_path / "run" / "log.txt").read_text() == expected
    # A run that was resumed elsewhere has become another one.
    fit(build(tiny_config(tiny_digits, tmp_path / "branch", **SETTINGS), resume=str(tmp_path / "copy.pth")))
    with pytest.raises(FileExistsError, match="contains another run"):
        build(config, resume=str(tmp_path / "branch" / STATE))


def test_a_state_from_before_runs_had_an_id_resumes_in_its_folder_only(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", **SETTINGS, epochs=1)
    fit(build(config))
    entries = read_state(tmp_path / "run" / STATE)
    for name in ("run_id", "images"):
        del entries["localvit"][name]
    del entries["states"]
    torch.save(entries, tmp_path / "run" / STATE)
    torch.save(entries, tmp_path / "copy.pth")
    longer = config.model_copy(update={"epochs": 2})
    with pytest.raises(FileExistsError, match="contains another run"):
        build(longer, resume=str(tmp_path / "copy.pth"))
    fit(build(longer, resume=str(tmp_path / "run" / STATE)))
    assert len(read_log(tmp_path / "run" / "log.txt")) == 2


def test_two_runs_in_one_folder_do_not_both_write(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", **SETTINGS, epochs=1)
    first, second = build(config), build(config)
    errors = []

    def start_second(done, note):
        with pytest.raises(FileExistsError) as raised:
            fit(second)
        errors.append(str(raised.value))

    fit(first, progress=start_second)
    assert all("another process is training in" in error for error in errors)
    assert len(errors) == 2
    after = contents(tmp_path / "run")
    with pytest.raises(FileExistsError, match="another process has trained in"):
        fit(second)
    assert contents(tmp_path / "run") == after


def test_a_stopped_run_continues_in_the_same_process(tiny_digits, tmp_path):
    training = build(tiny_config(tiny_digits, tmp_path, **SETTINGS, epochs=1))
    with pytest.raises(Stopped):
        fit(replace(training, criterion=Interrupting(signal.SIGTERM)))
    assert fit(training).num_epochs == 1


HOLDER = """
import os, runpy, sys, time
from pathlib import Path
locked = runpy.run_path(sys.argv[1])["locked"]  # without the package, whose import takes long
with locked(Path(sys.argv[2])):
    if os.fork() == 0:  # like a data worker, which may live longer than its parent
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_no_lock_although_its_child_lives(tmp_path):
    arguments = [file_lock.__file__, str(tmp_path / "lock")]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        children = subprocess.run(["pgrep", "-P", str(holder.pid)], capture_output=True, text=True, check=True).stdout
        time.sleep(0.2)
        holder.kill()
        holder.wait()
        with locked(tmp_path / "lock"):
            assert children.split()
    finally:
        holder.stdout.close()
        os.kill(int(children), signal.SIGKILL)


def test_copies_of_checkpoints_stay(tmp_path):
    mine = ("checkpoint.50.pth", "checkpoint.0.pth", "checkpoint.01.pth", "checkpoint.best.pth", "checkpoint.3.pth")
    for name in mine:
        (tmp_path / name).write_text("mine")
    for step in range(4):
        save_state({"model": {}, "step": step}, tmp_path, keep=2)
        if step == 2:
            (tmp_path / "checkpoint.2.pth").write_text("mine")
    assert all((tmp_path / name).read_text() == "mine" for name in (*mine, "checkpoint.2.pth"))
    assert [torch.load(tmp_path / name)["step"] for name in (STATE, "checkpoint.1.pth")] == [3, 2]
    (tmp_path / STATE).write_bytes(b"damaged")
    assert newest_state(tmp_path)["step"] == 2
    (tmp_path / STATE).unlink()
    (tmp_path / "checkpoint.1.pth").unlink()
    assert newest_state(tmp_path) is None


def test_a_copy_stays_after_a_kill_before_the_newest_checkpoint_was_renamed(tmp_path):
    for step in range(3):
        save_state({"model": {}, "step": step}, tmp_path, keep=2)
    (tmp_path / STATE).rename(tmp_path / "checkpoint.new.pth")
    (tmp_path / "checkpoint.2.pth").write_text("mine")
    save_state({"model": {}, "step": 3}, tmp_path, keep=2)
    assert (tmp_path / "checkpoint.2.pth").read_text() == "mine"
    assert torch.load(tmp_path / STATE)["step"] == 3


def test_a_copy_is_not_replaced_by_a_larger_number_of_checkpoints(tmp_path):
    save_state({"model": {}, "step": 0}, tmp_path, keep=2)
    (tmp_path / "checkpoint.1.pth").write_text("mine")
    for step in (1, 2):
        save_state({"model": {}, "step": step}, tmp_path, keep=3)
        assert (tmp_path / "checkpoint.1.pth").read_text() == "mine"
        assert torch.load(tmp_path / STATE)["step"] == step


def test_a_run_resumed_in_a_new_folder_has_the_best_model(finished, tiny_digits, tmp_path, capsys):
    """With no epoch left; the recommended files exist, with the weights of their epochs."""
    run_training(tiny_config(tiny_digits, tmp_path / "new", **SETTINGS), str(finished / STATE))
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "new" / "last.safetensors")
    for name in ("last.safetensors", "best.safetensors"):
        new, old = read_checkpoint(tmp_path / "new" / name), read_checkpoint(finished / name)
        assert new.about["metrics"] == old.about["metrics"]
        assert all(torch.equal(new.raw[key], value) for key, value in old.raw.items())
    assert (tmp_path / "new" / "log.txt").read_text() == (finished / "log.txt").read_text()


def test_lost_weights_of_the_best_epoch_are_reported(finished, tiny_digits, tmp_path, caplog):
    """The state is alone, and its best epoch the first of two."""
    entries = read_state(finished / STATE)
    rows = entries["localvit"]["progress"]["rows"]
    metrics = entries["localvit"]["progress"]["metrics"]
    for each in (rows, metrics):
        each[0]["test_acc1"], each[1]["test_acc1"] = 99.0, 12.0
    torch.save(entries, tmp_path / "alone.pth")
    run_training(tiny_config(tiny_digits, tmp_path / "new", **SETTINGS), str(tmp_path / "alone.pth"))
    assert any("the weights of the best epoch, 1, are not in" in line for line in caplog.messages)
    assert read_checkpoint(tmp_path / "new" / "best.safetensors").about["epoch"] == 1
    assert "Evaluate epoch 2, the best whose weights are known" in (tmp_path / "new" / "summary.md").read_text()


def test_a_run_that_ends_before_the_epochs_in_its_folder_has_the_models_of_its_own_end(finished, tiny_digits, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.copy(folder / "last.safetensors", folder / "best.safetensors")  # as if the second epoch were the best
    config = tiny_config(tiny_digits, folder, **SETTINGS, epochs=1)
    run_training(config, str(folder / "checkpoint.1.pth"))
    expected = read_log(folder / "log.txt")
    assert [row["epoch"] for row in expected] == [0]
    for name in ("last.safetensors", "best.safetensors"):
        assert read_checkpoint(folder / name).about["metrics"] == expected[0]


def test_a_run_that_ends_before_its_checkpoint_and_whose_last_model_is_lost_is_refused(finished, tiny_digits, tmp_path):
    entries = read_state(finished / "checkpoint.1.pth")
    entries["localvit"]["progress"]["step"] = 1
    torch.save(entries, tmp_path / "alone.pth")
    config = tiny_config(tiny_digits, tmp_path / "new", **SETTINGS, epochs=1)
    with pytest.raises(CheckpointError, match=r"no epoch is left to train, and the weights after epoch 1 .*--epochs 2"):
        run_training(config, str(tmp_path / "alone.pth"))
    assert contents(tmp_path / "new").keys() <= {".lock"}


def test_another_number_of_processes_is_reported(finished, tiny_digits, tmp_path, caplog):
    """It changes the learning rate, and is not a setting."""
    entries = read_state(finished / STATE)
    entries["localvit"]["about"]["images_per_step"] = 28  # of two processes
    torch.save(entries, tmp_path / "two.pth")
    build(tiny_config(tiny_digits, tmp_path / "new", **SETTINGS), resume=str(tmp_path / "two.pth"))
    assert any(line.startswith("resuming with 14 images per step") for line in caplog.messages)


def test_a_published_checkpoint_with_no_epoch_left_is_refused(finished, tiny_digits, tmp_path):
    """It contains no accuracies, so there is no result."""
    entries = read_state(finished / STATE)
    del entries["localvit"]
    torch.save(entries, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match=r"no epoch is left to train, .*--epochs 3 or more"):
        run_training(tiny_config(tiny_digits, tmp_path / "new", **SETTINGS), str(tmp_path / "published.pth"))
    assert contents(tmp_path / "new").keys() <= {".lock"}


def test_the_best_model_is_replaced_when_a_run_goes_back_and_changes(finished, tiny_digits, tmp_path, caplog):
    """Its second epoch is another one, although it may have the same accuracy; the weights of the first are lost."""
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.copy(folder / "last.safetensors", folder / "best.safetensors")
    entries = read_state(folder / "checkpoint.1.pth")
    for each in ("rows", "metrics"):
        entries["localvit"]["progress"][each][0]["test_acc1"] = 99.0
    torch.save(entries, folder / "checkpoint.1.pth")
    run_training(tiny_config(tiny_digits, folder, **SETTINGS, warmup_lr=0.1), str(folder / "checkpoint.1.pth"))
    best = read_checkpoint(folder / "best.safetensors").about["metrics"]
    assert best == read_log(folder / "log.txt")[1] != read_log(finished / "log.txt")[1]
    assert sum("the weights of the best epoch, 1, are not in" in line for line in caplog.messages) == 1


def test_a_restarted_process_resumes_its_own_run_only(finished, tiny_digits, tmp_path, monkeypatch):
    """torchrun starts the same command again, also after an error about the folder of another run."""
    launch = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (launch | {"TORCHELASTIC_RESTART_COUNT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert build(tiny_config(tiny_digits, finished, **SETTINGS)).state.epoch == 2
    with pytest.raises(FileExistsError, match="contains another run"):
        build(tiny_config(tiny_digits, finished, **SETTINGS, lr=0.3))
    # Killed before its first checkpoint, it still resumes from the file.
    config = tiny_config(tiny_digits, tmp_path / "new", **SETTINGS)
    assert build(config, resume=str(finished / STATE)).state.epoch == 2


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_terminal_that_closes_stops_the_run_with_a_checkpoint(tiny_digits, tmp_path):
    """It may send the signal twice, from the kernel and from the shell."""
    training = build(tiny_config(tiny_digits, tmp_path, **SETTINGS, epochs=1))
    with pytest.raises(Stopped) as stopped:
        fit(replace(training, criterion=Interrupting(signal.SIGHUP, signal.SIGHUP)))
    assert stopped.value.exit_status == 128 + signal.SIGHUP
    assert read_state(tmp_path / STATE)["localvit"]["progress"]["step"] >= 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_run_started_with_nohup_goes_on(tiny_digits, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        training = build(tiny_config(tiny_digits, tmp_path, **SETTINGS, epochs=1))
        assert fit(replace(training, criterion=Interrupting(signal.SIGHUP))).num_epochs == 1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_dry_run_refuses_a_folder_that_cannot_be_written(tiny_digits, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, words in (("file", "cannot write to"), ("file/run", "cannot create")):
        with pytest.raises(OSError, match=f"{words} .*{folder}.*choose another --output-dir"):
            dry_run(build(tiny_config(tiny_digits, tmp_path / folder, **SETTINGS)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_settings_come_from_the_checkpoint(finished, tmp_path, monkeypatch):
    recorded = read_state(finished / STATE)["localvit"]["about"]["config"]
    assert parse(["--resume", str(finished / STATE)]).to_config().to_dict() == recorded
    changed = parse(["--resume", str(finished / STATE), "--output-dir", "new"]).to_config().to_dict()
    assert changed == recorded | {"output_dir": "new"}
    (tmp_path / STATE).write_bytes((finished / STATE).read_bytes())  # without config.yaml
    assert parse(["--resume", "auto", "--output-dir", str(tmp_path)]).to_config().model_args == {"depth": 1}


def test_a_checkpoint_that_is_missing_is_one_line(tiny_digits, tmp_path):
    with pytest.raises((FileNotFoundError, CheckpointError), match="no checkpoint at"):
        build(tiny_config(tiny_digits, tmp_path), resume=str(tmp_path / "nowhere.pth"))


def test_the_demo_does_not_replace_another_run(tmp_path):
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(FileExistsError, match="contains another run than a demo"):
        run_demo(TrainConfig(data_path=tmp_path, output_dir=tmp_path))
    assert (tmp_path / "log.txt").read_text() == "{}\n"
