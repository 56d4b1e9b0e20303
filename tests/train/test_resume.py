"""Resuming after any kind of end, with bit-exact results, from whichever checkpoint is intact."""

import json
import os
import random
import signal
import subprocess
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import same, skip_without_plateau, tiny_config, train
from torch import nn

import localvit
from localvit.models.published_names import published_key
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.loop import Stopped, fit
from localvit.train.optimization import build_optimizer, build_scheduler
from localvit.train.run_folder import STATE, newest_state, read_state, save_state
from localvit.train.state import ModelEmaV3, TrainState
from localvit.utils.weight_files import CheckpointError
from processes import run_localvit, start, status_of
from published import published_state

EVERYTHING = ("model", "model_ema", "optimizer", "scaler", "lr_scheduler", "epoch")


def outcome(directory):
    """Everything that must not depend on where a run was interrupted."""
    entries = read_state(directory / STATE)
    progress = {
        key: value for key, value in entries["localvit"]["progress"].items() if key in ("rows", "losses", "step")
    }
    return {key: entries[key] for key in EVERYTHING} | progress | {"log": (directory / "log.txt").read_text()}


def write_config(path, config):
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path


class Interrupting(nn.Module):
    """The loss; sends a signal to this process at one call."""

    def __init__(self, call, number):
        super().__init__()
        self.calls_left, self.number = call, number

    def forward(self, images_BCHW, logits_BM, targets):
        if self.calls_left == 0:
            os.kill(os.getpid(), self.number)
        self.calls_left -= 1
        return nn.functional.cross_entropy(logits_BM, targets)


@pytest.fixture(scope="module")
def uninterrupted(tiny_digits, tmp_path_factory):
    """An uninterrupted run of 3 epochs with 3 steps, with all random augmentation."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    fit(build(run_config(tiny_digits, folder)))
    return outcome(folder)


def run_config(data, folder, **changes):
    small = {"epochs": 3, "batch_size": 12, "model_args": {"depth": 2}}
    settings = small | {"checkpoint_steps": 1, "label_smoothing": 0.0} | changes
    return tiny_config(data, folder, **settings)


@pytest.mark.parametrize(
    ("call", "number"),
    [(0, signal.SIGTERM), (2, signal.SIGINT), (4, signal.SIGUSR1), (8, signal.SIGTERM)],
)
def test_a_run_resumed_after_a_signal_is_bit_exact(tiny_digits, tmp_path, uninterrupted, call, number):
    config = run_config(tiny_digits, tmp_path, checkpoint_steps=None)
    training = replace(build(config), criterion=Interrupting(call, number))
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        fit(training)
    assert signal.getsignal(number) == before
    assert stopped.value.exit_status == 128 + number
    state = read_state(tmp_path / STATE)["localvit"]["progress"]
    # The loop sees it in the next step, or after the evaluation of the epoch.
    assert state["epoch"] * 3 + state["step"] in (call + 1, call + 2)
    fit(build(config, resume="auto"))
    assert same(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_run_killed_at_random_moments_is_bit_exact(tiny_digits, tmp_path, uninterrupted, workers):
    generator = random.Random(workers)
    config_file = write_config(tmp_path / "c.yaml", run_config(tiny_digits, tmp_path / "run", workers=workers))
    kills = 0
    for _ in range(12):
        err = tmp_path / "err"
        err.unlink(missing_ok=True)
        run = start(run_localvit, "train", "--config", config_file, "--resume", "auto", err=err)
        if kills < 2:
            # Wait until this process has saved its first checkpoint.
            seen = time.time()
            state = tmp_path / "run" / STATE
            while run.is_alive() and not (state.exists() and state.stat().st_mtime > seen):
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.5))
            run.kill()
            kills += status_of(run) == -signal.SIGKILL
            continue
        assert status_of(run) == 0, err.read_text()
        break
    assert kills == 2
    assert same(outcome(tmp_path / "run"), uninterrupted)


def some_checkpoints(tiny_digits, folder):
    """Write the newest three checkpoints of a run of two epochs; returns its config."""
    config = run_config(tiny_digits, folder, epochs=2, keep=3, warmup_epochs=0)
    fit(build(config))
    return config


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_digits, tmp_path, caplog, harm):
    config = some_checkpoints(tiny_digits, tmp_path)
    state = tmp_path / STATE
    content = bytearray(state.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
    harmed = {"cut": content[: len(content) // 3], "flipped": content, "empty": b"", "gone": b""}[harm]
    state.write_bytes(harmed)
    if harm == "gone":
        state.unlink()
    before = read_state(tmp_path / "checkpoint.1.pth")
    caplog.clear()
    found = newest_state(tmp_path)
    assert same(found["model"], before["model"])
    assert found["localvit"]["progress"]["step"] == 3  # of the last epoch, before its evaluation
    if harm != "gone":
        assert "checkpoint.pth" in caplog.messages[0]
        assert "trying the checkpoint before" in caplog.messages[0]
    expected = (tmp_path / "log.txt").read_text()
    fit(build(config, resume="auto"))
    assert (tmp_path / "log.txt").read_text() == expected


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    for name in (STATE, "checkpoint.1.pth"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged"):
        newest_state(tmp_path)


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in range(5):
        save_state({"model": {}, "step": step}, tmp_path, keep=3)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == sorted(["checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth"][: step + 1])
    assert [torch.load(tmp_path / name)["step"] for name in (STATE, "checkpoint.1.pth", "checkpoint.2.pth")] == [
        4,
        3,
        2,
    ]
    save_state({"model": {}, "step": 5}, tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_a_checkpoint_that_was_not_yet_renamed_is_the_newest(tmp_path):
    save_state({"model": {}, "step": 1}, tmp_path, keep=2)
    torch.save({"model": {}, "step": 2}, tmp_path / "checkpoint.new.pth")
    assert newest_state(tmp_path)["step"] == 2


@contextmanager
def small_disk(folder, size):
    """A separate, small file system in `folder`."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights than this user has")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_earlier_checkpoints_unchanged(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        save_state({"model": {"a": torch.zeros(10_000)}, "step": 1}, disk, keep=2)
        with pytest.raises(OSError, match="its disk is full"):
            save_state({"model": {"a": torch.zeros(60_000)}, "step": 2}, disk, keep=2)
        assert read_state(disk / STATE)["step"] == 1
        assert [path.name for path in disk.iterdir()] == [STATE]


def test_a_disk_too_small_for_the_run_stops_before_training(tiny_digits, tmp_path):
    """One checkpoint fits into 16 MB: weights and average have 3 MB each. Two with moments and the models do not."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        training = build(tiny_config(tiny_digits, disk / "run", model_args={}))
        with pytest.raises(
            OSError, match=r"has 17 MB of free space, and the run may need 47 MB for 2 checkpoints and two"
        ):
            fit(training)
        assert list((disk / "run").iterdir()) == []


def test_a_folder_that_cannot_be_written_stops_before_training(tiny_digits, tmp_path):
    (tmp_path / "file").write_text("")
    training = build(tiny_config(tiny_digits, tmp_path / "file" / "run"))
    with pytest.raises(OSError, match="cannot create"):
        fit(training)


def published_checkpoint(model, epoch):
    """A checkpoint of the published program, and the order of its parameters by published name."""
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # The published program has T2T's unused norms in its optimizer too.
    names |= {name: buffer for name, buffer in model.named_buffers() if ".norm2." in name}
    raw = published_state(model.made_from["name"])
    by_name = {published_key(model, name): parameter for name, parameter in names.items()}
    own_list = model.no_weight_decay()
    groups = ([], [])
    for key in raw:
        if key in by_name:
            decays = by_name[key].ndim > 1 and not key.endswith(".bias") and key not in own_list
            groups[decays].append(key)
    order = [*groups[0], *groups[1]]
    moments = {
        number: {
            "step": 7,
            "exp_avg": torch.full_like(by_name[key], number + 0.25),
            "exp_avg_sq": torch.full_like(by_name[key], number + 0.5),
        }
        for number, key in enumerate(order)
    }
    shared = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "initial_lr": 1e-3}
    first = len(groups[0])
    param_groups = [
        shared | {"weight_decay": 0.0, "params": list(range(first))},
        shared | {"weight_decay": 0.05, "params": list(range(first, len(order)))},
    ]
    return order, {
        "model": raw,
        "optimizer": {"state": moments, "param_groups": param_groups},
        "lr_scheduler": {"base_values": [1e-3, 1e-3]},
        "epoch": epoch,
        "model_ema": {key: value + 1 if value.is_floating_point() else value for key, value in raw.items()},
        "scaler": {},
        "args": Namespace(model=model.made_from["name"]),
    }


@pytest.mark.parametrize("named", [False, True], ids=["published", "ours"])
@pytest.mark.parametrize("name", ["localvit_tiny_mlp4_act3_r192", "localvit_pvt_tiny", "localvit_T2t_conv7"])
def test_a_published_checkpoint_resumes(tmp_path, name, named):
    """Weights, average and moments are matched by name; PVT and T2T have another order of parameters.

    A state of this package names the parameters itself; earlier versions had T2T's unused norms among them too.
    """
    model = localvit.create_model(name)
    order, content = published_checkpoint(model, epoch=41)
    if named:
        content["localvit"] = {"progress": {"epoch": 42}, "parameter_names": order}
    torch.save(content, tmp_path / "published.pth")
    optimizer = build_optimizer(TrainConfig(), model, 1024)
    state = TrainState(
        model=model,
        ema=ModelEmaV3(model),
        optimizer=optimizer,
        scheduler=build_scheduler(TrainConfig(), optimizer, 1),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    state.load_entries(read_state(tmp_path / "published.pth"))
    assert (state.epoch, state.step) == (42, 0)
    for own, parameter in model.named_parameters():
        key = published_key(model, own)
        assert torch.equal(parameter, content["model"][key])
        assert torch.equal(state.ema.module.get_parameter(own), content["model_ema"][key])
        if parameter.requires_grad:
            moment = optimizer.state[parameter]
            number = order.index(key)
            assert moment["step"] == 7
            assert moment["exp_avg"].unique().tolist() == [number + 0.25]
            assert moment["exp_avg_sq"].unique().tolist() == [number + 0.5]
    state.begin_epoch()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(9.5e-4, rel=0.02)  # cosine of 1e-3 at epoch 41 of 300


def test_a_run_resumes_from_the_entries_of_the_published_program(tiny_digits, tmp_path):
    """From our checkpoint without our own entries, after the first of two epochs."""
    fit(build(run_config(tiny_digits, tmp_path / "whole", epochs=2)))
    half = run_config(tiny_digits, tmp_path / "half", epochs=2, early_stopping=1, checkpoint_steps=None)
    training = replace(build(half), criterion=Interrupting(2, signal.SIGTERM))  # the last step of the epoch
    with pytest.raises(Stopped):
        fit(training)
    training = replace(build(half, resume="auto"), criterion=Interrupting(0, signal.SIGTERM))
    with pytest.raises(Stopped):
        fit(training)
    entries = torch.load(tmp_path / "half" / "checkpoint.1.pth", weights_only=False)
    assert entries["epoch"] == 0
    del entries["localvit"]
    torch.save(entries, tmp_path / "published.pth")
    config = run_config(tiny_digits, tmp_path / "on", epochs=2)
    (row,) = train(config, resume=str(tmp_path / "published.pth"))
    names = ("model", "model_ema", "optimizer")
    states = [read_state(folder / STATE) for folder in (tmp_path / "whole", tmp_path / "on")]
    assert same(*({name: state[name] for name in names} for state in states))
    assert json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[1]) == row


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model": {}}, "no optimizer: start a new run from it with --finetune"),
        ({"model": {"a": torch.zeros(3)}, "optimizer": {"state": {}, "param_groups": []}}, "for another model"),
    ],
)
def test_checkpoints_that_cannot_be_resumed(tiny_digits, tmp_path, entries, words):
    torch.save(entries, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=words):
        build(tiny_config(tiny_digits, tmp_path / "run"), resume=str(tmp_path / "other.pth"))


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
def test_a_resumed_plateau_schedule_keeps_its_patience(tiny_digits, tmp_path):
    """timm saves the best accuracy but not its epoch; a resume must not start the wait from the beginning."""
    skip_without_plateau()
    settings = {"sched": "plateau", "patience_epochs": 2, "decay_rate": 0.5, "warmup_epochs": 0, "epochs": 12}

    def rates(ends_at):
        training = build(tiny_config(tiny_digits, tmp_path, **settings))
        for epoch in range(12):
            if epoch == ends_at:
                entries = training.state.to_entries(training.describe())
                training = build(tiny_config(tiny_digits, tmp_path, **settings))
                training.state.load_entries(entries)
            training.state.begin_epoch()
            yield training.state.optimizer.param_groups[0]["lr"]
            training.state.finish_epoch({"epoch": epoch, "test_acc1": 50.0}, {})

    uninterrupted = list(rates(None))
    assert len(set(uninterrupted)) > 2
    for ends_at in (3, 4, 7):
        assert list(rates(ends_at)) == uninterrupted


def test_the_batch_size_cannot_change_within_an_epoch(tiny_digits, tmp_path):
    training = replace(build(run_config(tiny_digits, tmp_path)), criterion=Interrupting(0, signal.SIGTERM))
    with pytest.raises(Stopped):
        fit(training)
    with pytest.raises(CheckpointError, match="an epoch with 12 images per step, and this run has 6"):
        build(run_config(tiny_digits, tmp_path, batch_size=6), resume="auto")


def test_changed_settings_are_a_warning(tiny_digits, tmp_path, caplog):
    fit(build(run_config(tiny_digits, tmp_path, epochs=2)))
    caplog.clear()
    build(run_config(tiny_digits, tmp_path, epochs=4, lr=0.5, workers=1), resume="auto")
    assert any("epochs=4; the run started with 2" in line for line in caplog.messages)
    assert any("lr=0.5" in line for line in caplog.messages)
    assert not any("workers" in line for line in caplog.messages)
