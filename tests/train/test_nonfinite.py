"""Losses and gradients that are not finite: nothing changes, the message names the cause, and steps can be skipped."""

import copy
import csv
import itertools
import shutil

import pytest
import torch
from PIL import Image
from tiny import STILL, same, tiny_config

from localvit.train.builder import build
from localvit.train.device_batches import DeviceBatches
from localvit.train.loop import MAX_SKIPPED_IN_ROW, fit
from localvit.train.nonfinite import explain
from localvit.train.run_folder import STATE, read_state
from localvit.train.step import StepResult, train_step
from localvit.utils.distributed import process_group, rank
from processes import start_group, status_of


@pytest.fixture
def one_white(tiny_digits, tmp_path):
    """The digits, one of them replaced by a white image; and its name."""
    root = tmp_path / "digits"
    shutil.copytree(tiny_digits, root)
    white = min((root / "train" / "1").iterdir())
    Image.new("RGB", (32, 32), "white").save(white)
    return root, f"1/{white.name}"


def is_white(images_BCHW):
    return (images_BCHW.mean((1, 2, 3)) > 1).view(-1, 1, 1, 1)


def with_nan_output(training):
    """The patch embedding returns NaN for a white image."""

    def hook(module, inputs, output):
        return torch.where(is_white(inputs[0]), torch.nan, output)

    training.state.model.patch_embed.register_forward_hook(hook)
    return training


def with_nan_gradient(training, condition=lambda images_BCHW: True):
    """The patch embedding returns finite numbers, but its gradient is NaN: that of the square root at 0, times 0."""

    def hook(module, inputs, output):
        return output + (output * 0).abs().sqrt() if condition(inputs[0]) else output

    training.state.model.patch_embed.register_forward_hook(hook)
    return training


def everything(training):
    """A copy of all that a step may change."""
    state = training.state
    parts = (state.model.state_dict(), state.ema.module.state_dict(), state.optimizer.state_dict())
    return copy.deepcopy(parts)


def is_finite(training):
    weights, average, _ = everything(training)
    return all(value.isfinite().all() for value in (*weights.values(), *average.values()))


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_a_nonfinite_loss_stops_the_run_before_anything_changes(one_white, tmp_path, grad_accum):
    root, name = one_white
    changes = {"epochs": 1, "warmup_epochs": 0, "batch_size": 12 // grad_accum, "grad_accum": grad_accum}
    config = tiny_config(root, tmp_path / "run", **changes, **STILL)
    training = with_nan_output(build(config))
    number = next(number for number in range(len(training.batches)) if name in training.batches.batch(0, number)[2])
    step = number // grad_accum
    assert 0 < step < training.steps_per_epoch - 1 or grad_accum > 1  # the order of this seed has it in the middle
    with pytest.raises(FloatingPointError) as raised:
        fit(training)
    message = str(raised.value)
    assert f"the loss is nan in epoch 1, step {step + 1}" in message
    assert f"patch_embed is the first whose output is not finite, on {name}" in message
    assert "--nonfinite skip" in message
    # The checkpoint is that of a run that stops right before this step.
    assert is_finite(training)
    progress = read_state(tmp_path / "run" / STATE)["localvit"]["progress"]
    assert (progress["step"], len(progress["losses"])) == (step, step)
    before = everything(training)
    explain(training, StepResult(loss=float("nan"), stop=False, nonfinite="the loss is nan"))
    assert same(everything(training), before)


def test_a_step_that_raises_changes_nothing(tiny_digits, tmp_path):
    """The last block raises, after the batch norms of the first ones have seen the batch."""
    training = build(tiny_config(tiny_digits, tmp_path / "run", batch_size=6, **STILL))
    before = everything(training)

    def fail(module, inputs):
        raise MemoryError("stop")

    training.state.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="stop"):
        train_step(training, training.device_batches(0), stop=False)
    assert same(everything(training), before)


@pytest.mark.parametrize("make_bad", [with_nan_output, lambda training: with_nan_gradient(training, has_white)])
def test_skipping_a_step(one_white, tmp_path, caplog, make_bad):
    root, _ = one_white
    config = tiny_config(root, tmp_path / "run", batch_size=6, nonfinite="skip", **STILL)
    training = make_bad(build(config))
    fit(training)
    rows = training.state.rows
    assert len(rows) == 2
    assert training.state.skipped == 2  # once in each epoch
    assert sum("step skipped" in line for line in caplog.messages) == 2
    assert all(row["train_loss"] == row["train_loss"] for row in rows)
    assert is_finite(training)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[-1]["skipped_steps"] == "2"


def has_white(images_BCHW):
    return bool(is_white(images_BCHW).any())


def test_skipping_stops_after_ten_in_a_row(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", batch_size=2, nonfinite="skip", **STILL)
    training = build(config)
    training.state.model.head.register_forward_hook(lambda module, inputs, output: output * torch.inf)
    words = f"head is the first .* this is the {MAX_SKIPPED_IN_ROW}th such step in a row"
    with pytest.raises(FloatingPointError, match=words):
        fit(training)
    assert training.state.step == MAX_SKIPPED_IN_ROW - 1


def test_nonfinite_weights_are_not_saved(tiny_digits, tmp_path):
    training = build(tiny_config(tiny_digits, tmp_path / "run", **STILL))
    with torch.no_grad():
        training.state.model.blocks[1].attn.qkv.weight[3, 5] = torch.nan
    with pytest.raises(
        FloatingPointError, match=r"blocks.1.attn.qkv.weight is not finite, because of an ear"
    ) as raised:
        fit(training)
    assert "is from an earlier step" in str(raised.value)
    assert training.config.output_dir.exists()


def after_one_step(data, folder, **changes):
    """A run after its first step, which gives the optimizer a state; and its next batches, again and again."""
    small = {"batch_size": 6, "warmup_epochs": 0, "input_size": (8,), "model_args": {"depth": 2}}
    changes = small | STILL | changes
    training = build(tiny_config(data, folder, **changes))
    training.state.begin_epoch()
    batches = training.device_batches(0)
    train_step(training, batches, stop=False)
    training.state.step = 1
    again = itertools.cycle(itertools.islice(batches, training.config.grad_accum))
    return training, DeviceBatches(again, training.options)


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_nonfinite_gradient_changes_nothing(tiny_digits, tmp_path, dtype, clip_grad, grad_accum):
    settings = {"dtype": dtype, "clip_grad": clip_grad, "grad_accum": grad_accum}
    training, batches = after_one_step(tiny_digits, tmp_path, **settings)
    with_nan_gradient(training)
    before = everything(training)
    scaler = training.state.scaler
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {"scale": 8.0})
    while scaler.get_scale() > 1:  # float16: the gradient may be an overflow, until the loss is no longer scaled up
        scale = scaler.get_scale()
        result = train_step(training, batches, stop=False)
        assert result.nonfinite is None
        assert scaler.get_scale() == scale / 2
        assert same(everything(training), before)
    result = train_step(training, batches, stop=False)
    assert result.nonfinite == "the gradient of patch_embed.proj.weight is not finite"
    assert result.loss == result.loss
    assert same(everything(training), before)
    assert all(parameter.grad is None for parameter in training.state.model.parameters())


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_a_float16_overflow_changes_only_the_scale(tiny_digits, tmp_path, clip_grad):
    """The loss times 2^100 is finite in float32, its gradient in float16 is not; the next step works again."""
    training, batches = after_one_step(tiny_digits, tmp_path, dtype="float16", clip_grad=clip_grad)
    before = everything(training)
    scaler = training.state.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**100})
    result = train_step(training, batches, stop=False)
    assert result.nonfinite is None
    assert scaler.get_scale() == 2.0**99
    assert same(everything(training), before)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**10})
    train_step(training, batches, stop=False)
    for now, then in zip(everything(training), before, strict=True):
        assert not same(now, then)
    assert is_finite(training)


def test_a_nonfinite_gradient_stops_the_run_with_its_name(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", batch_size=12, checkpoint_steps=1, **STILL)
    training = with_nan_gradient(build(config))
    before = everything(training)
    words = r"the gradient of patch_embed.proj.weight is not finite in epoch 1, step 1, although the loss is \d"
    with pytest.raises(FloatingPointError, match=words):
        fit(training)
    assert same(everything(training), before)
    assert read_state(tmp_path / "run" / STATE)["localvit"]["progress"]["step"] == 0


def test_an_overflowing_norm_of_finite_gradients_changes_nothing(tiny_digits, tmp_path):
    """Elements of 1e30 are finite in float32, their squares are not."""
    training, batches = after_one_step(tiny_digits, tmp_path)
    training.state.model.head.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    before = everything(training)
    result = train_step(training, batches, stop=False)
    assert result.nonfinite == "the norm of the gradient is inf, although each of its elements is finite"
    assert same(everything(training), before)


def one_step_then_a_nan(config):
    """In each of two processes: a step, and another whose gradient is NaN in the second process only."""
    with process_group(torch.device("cpu")):
        training = build(config)
        training.state.begin_epoch()
        batches = training.device_batches(0)
        train_step(training, batches, stop=False)
        training.state.step = 1
        before = everything(training)
        if rank() == 1:
            with_nan_gradient(training)
        result = train_step(training, batches, stop=False)
        assert result.nonfinite == "the gradient of patch_embed.proj.weight is not finite", result
        assert same(everything(training), before)


@pytest.mark.parametrize("changes", [{}, {"clip_grad": 1.0, "grad_accum": 2, "dtype": "bfloat16"}])
def test_a_nonfinite_gradient_of_one_process_changes_nothing_on_any(tiny_digits, tmp_path, changes):
    config = tiny_config(tiny_digits, tmp_path / "run", batch_size=4, input_size=(8,), **STILL, **changes)
    err = tmp_path / "err"
    group = start_group(2, one_step_then_a_nan, config, out=tmp_path / "out", err=err)
    assert [status_of(each) for each in group] == [0, 0], err.read_text()
