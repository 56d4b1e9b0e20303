"""Going on after an end of any kind: with the same bits, from whatever is whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import skip_without_plateau, tiny_config
from torch import nn

import localvit
from localvit.models.published_names import published_key
from localvit.train.build import build
from localvit.train.config import TrainConfig
from localvit.train.loop import fit
from localvit.train.run_folder import STATE, newest_state, read_state, save_state
from localvit.train.stopping import Stopped
from localvit.utils.weight_files import CheckpointError
from published import published_state

EVERYTHING = ("model", "model_ema", "optimizer", "scaler", "lr_scheduler", "epoch")


def same(one, other) -> bool:
    """Whether two trees of plain values and tensors hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def outcome(directory):
    """All that must not depend on where a run was interrupted."""
    entries = read_state(directory / STATE)
    progress = {
        key: value for key, value in entries["localvit"]["progress"].items() if key in ("rows", "losses", "step")
    }
    return {key: entries[key] for key in EVERYTHING} | progress | {"log": (directory / "log.txt").read_text()}


def command(config_file, *flags):
    return [sys.executable, "-m", "localvit", "train", "--config", str(config_file), *flags]


def write_config(path, config):
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path


class Interrupting(nn.Module):
    """The loss, with a signal to this process at one call."""

    def __init__(self, call, number):
        super().__init__()
        self.calls_left, self.number = call, number

    def forward(self, images_BCHW, logits_BM, targets):
        if self.calls_left == 0:
            os.kill(os.getpid(), self.number)
        self.calls_left -= 1
        return nn.functional.cross_entropy(logits_BM, targets)


@pytest.fixture(scope="module")
def undisturbed(tiny_digits, tmp_path_factory):
    """A run of 3 epochs of 3 steps, every random draw on, that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    fit(build(eventful(tiny_digits, folder)))
    return outcome(folder)


def eventful(data, folder, **changes):
    settings = {"epochs": 3, "batch_size": 12, "checkpoint_steps": 1, "label_smoothing": 0.0} | changes
    return tiny_config(data, folder, **settings)


@pytest.mark.parametrize(
    ("call", "number"),
    [(0, signal.SIGTERM), (2, signal.SIGINT), (4, signal.SIGUSR1), (8, signal.SIGTERM)],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tiny_digits, tmp_path, undisturbed, call, number):
    config = eventful(tiny_digits, tmp_path, checkpoint_steps=None)
    training = replace(build(config), criterion=Interrupting(call, number))
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        fit(training)
    assert signal.getsignal(number) == before
    assert stopped.value.exit_status == 128 + number
    state = read_state(tmp_path / STATE)["localvit"]["progress"]
    # It is told of with the next step, or after the epoch's evaluation if there is none.
    assert state["epoch"] * 3 + state["step"] in (call + 1, call + 2)
    fit(build(config, resume="auto"))
    assert same(outcome(tmp_path), undisturbed)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tiny_digits, tmp_path, undisturbed, workers):
    draws = random.Random(workers)
    config_file = write_config(tmp_path / "c.yaml", eventful(tiny_digits, tmp_path / "run", workers=workers))
    kills = 0
    for _ in range(12):
        run = subprocess.Popen(
            command(config_file, "--resume", "auto"),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kills < 2:
            # Once there is something to lose: the state that the run begins with is in place.
            seen = time.time()
            state = tmp_path / "run" / STATE
            while run.poll() is None and not (state.exists() and state.stat().st_mtime > seen):
                time.sleep(0.01)
            time.sleep(draws.uniform(0, 0.5))
            run.kill()
            kills += run.wait() == -signal.SIGKILL
            run.stderr.close()
            continue
        _, told = run.communicate()
        assert run.returncode == 0, told
        break
    assert kills == 2
    assert same(outcome(tmp_path / "run"), undisturbed)


def some_states(tiny_digits, folder):
    """The newest three states of a run of two steps, and its config."""
    config = eventful(tiny_digits, folder, epochs=2, keep=3, warmup_epochs=0)
    fit(build(config))
    return config


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_state_falls_back_to_the_one_before(tiny_digits, tmp_path, harm):
    config = some_states(tiny_digits, tmp_path)
    state = tmp_path / STATE
    content = bytearray(state.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
    harmed = {"cut": content[: len(content) // 3], "flipped": content, "empty": b"", "gone": b""}[harm]
    state.write_bytes(harmed)
    if harm == "gone":
        state.unlink()
    told = []
    before = read_state(tmp_path / "checkpoint.1.pth")
    found = newest_state(tmp_path, told.append)
    assert same(found["model"], before["model"])
    assert found["localvit"]["progress"]["step"] == 3  # of the last epoch, before its evaluation
    if harm != "gone":
        assert "checkpoint.pth" in told[0]
        assert "going on from the state before" in told[0]
    wanted = (tmp_path / "log.txt").read_text()
    fit(build(config, resume="auto"))
    assert (tmp_path / "log.txt").read_text() == wanted


def test_no_whole_state_is_an_error(tmp_path):
    for name in (STATE, "checkpoint.1.pth"):
        (tmp_path / name).write_bytes(b"no state")
    with pytest.raises(CheckpointError, match=r"no state in .* is whole"):
        newest_state(tmp_path, lambda message: None)


def test_the_newest_few_are_kept(tmp_path):
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


def test_a_state_that_was_written_but_not_placed_is_the_newest(tmp_path):
    save_state({"model": {}, "step": 1}, tmp_path, keep=2)
    torch.save({"model": {}, "step": 2}, tmp_path / "checkpoint.new.pth")
    assert newest_state(tmp_path, lambda message: None)["step"] == 2


@contextmanager
def small_disk(folder, size):
    """A file system of its own in `folder`."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights than this user has")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_no_earlier_state(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        save_state({"model": {"a": torch.zeros(10_000)}, "step": 1}, disk, keep=2)
        with pytest.raises(OSError, match="its disk is full"):
            save_state({"model": {"a": torch.zeros(60_000)}, "step": 2}, disk, keep=2)
        assert read_state(disk / STATE)["step"] == 1
        assert [path.name for path in disk.iterdir()] == [STATE]


def test_a_disk_too_small_for_the_run_stops_before_training(tiny_digits, tmp_path):
    """A state alone would fit into 16 MB: weights and average of 3 MB each. Two, with moments, and models do not."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        training = build(tiny_config(tiny_digits, disk / "run"))
        with pytest.raises(OSError, match=r"has 17 MB free, and the run may need 47 MB for 2 states and two models"):
            fit(training)
        assert list((disk / "run").iterdir()) == []


def test_a_folder_that_cannot_be_written_stops_before_training(tiny_digits, tmp_path):
    (tmp_path / "file").write_text("")
    training = build(tiny_config(tiny_digits, tmp_path / "file" / "run"))
    with pytest.raises(OSError, match="cannot be made"):
        fit(training)


def published_checkpoint(model, epoch):
    """What the published program saves, in its own order of parameters, and the moments by published name."""
    names = dict(model.named_parameters())
    raw = published_state(model.made_from["name"])
    by_name = {published_key(model, name): parameter for name, parameter in names.items()}
    own_list = model.no_weight_decay()
    groups = ([], [])
    for key in raw:
        if key in by_name and by_name[key].requires_grad:
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


@pytest.mark.parametrize("name", ["localvit_tiny_mlp4_act3_r192", "localvit_pvt_tiny", "localvit_T2t_conv7"])
def test_a_published_checkpoint_resumes(tmp_path, name):
    """Weights, average and each parameter's moments arrive by name; PVT and T2T keep another order of parameters."""
    from localvit.train.optimization import build_optimizer, build_scheduler
    from localvit.train.state import ModelEmaV3, TrainState

    model = localvit.create_model(name)
    order, content = published_checkpoint(model, epoch=41)
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


def test_a_run_goes_on_from_what_the_published_program_would_have_saved(tiny_digits, tmp_path):
    """Our own state without our own entries, at the end of the first of two epochs."""
    wanted = eventful(tiny_digits, tmp_path / "whole", epochs=2)
    fit(build(wanted))
    half = eventful(tiny_digits, tmp_path / "half", epochs=2, early_stopping=1, checkpoint_steps=None)
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
    config = eventful(tiny_digits, tmp_path / "on", epochs=2)
    (row,) = fit(build(config, resume=str(tmp_path / "published.pth")))
    names = ("model", "model_ema", "optimizer")
    states = [read_state(folder / STATE) for folder in (tmp_path / "whole", tmp_path / "on")]
    assert same(*({name: state[name] for name in names} for state in states))
    assert json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[1]) == row


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model": {}}, "no optimizer: begin a new run from it with --finetune"),
        ({"model": {"a": torch.zeros(3)}, "optimizer": {"state": {}, "param_groups": []}}, "of another model"),
    ],
)
def test_what_cannot_be_resumed_says_why(tiny_digits, tmp_path, entries, words):
    torch.save(entries, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=words):
        build(tiny_config(tiny_digits, tmp_path / "run"), resume=str(tmp_path / "other.pth"))


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
def test_a_plateau_goes_on_counting(tiny_digits, tmp_path):
    """timm saves the best accuracy alone, not how long ago it was: an end at any epoch must not begin the wait anew."""
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

    undisturbed = list(rates(None))
    assert len(set(undisturbed)) > 2
    for ends_at in (3, 4, 7):
        assert list(rates(ends_at)) == undisturbed


def test_inside_an_epoch_the_batch_stays(tiny_digits, tmp_path):
    training = replace(build(eventful(tiny_digits, tmp_path)), criterion=Interrupting(0, signal.SIGTERM))
    with pytest.raises(Stopped):
        fit(training)
    with pytest.raises(CheckpointError, match="an epoch of 12 images a step, and this run takes 6"):
        build(eventful(tiny_digits, tmp_path, batch_size=6), resume="auto")


def test_other_settings_are_remarked_on(tiny_digits, tmp_path):
    fit(build(eventful(tiny_digits, tmp_path, epochs=2)))
    told = []
    build(eventful(tiny_digits, tmp_path, epochs=4, lr=0.5, workers=1), told.append, resume="auto")
    assert any("epochs=4, where the run began with 2" in line for line in told)
    assert any("lr=0.5" in line for line in told)
    assert not any("workers" in line for line in told)
