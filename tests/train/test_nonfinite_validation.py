"""Epochs whose validation output is not finite: never the best, and no run ends well without a finite one."""

import json
import math

import pytest
import torch
from tiny import STILL, tiny_config

from localvit.checkpoints import read_checkpoint
from localvit.train.builder import build
from localvit.train.loop import fit
from localvit.train.summary import RunResult

SMALL = STILL | {"model_args": {"depth": 1}, "input_size": (8,), "epochs": 3, "lr": 1e-6, "batch_size": 13}
NAN = math.nan


def with_bad_epochs(training, epochs, images=9):
    """In these epochs, the output for the first validation images is NaN."""

    def hook(module, inputs, output):
        if module.training or training.state.epoch not in epochs:
            return output
        output = output.clone()
        output[:images] = torch.nan
        return output

    training.state.model.head.register_forward_hook(hook)
    return training


@pytest.mark.parametrize("images", [9, 1])
def test_a_nan_epoch_is_never_the_best(tiny_digits, tmp_path, caplog, images):
    training = with_bad_epochs(build(tiny_config(tiny_digits, tmp_path, **SMALL)), (0, 2), images)
    result = fit(training)
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [math.isnan(row["test_loss"]) for row in rows] == [True, False, True]
    assert result.best["epoch"] == training.state.best["epoch"] == 1
    assert read_checkpoint(tmp_path / "best.safetensors").about["epoch"] == 1
    assert read_checkpoint(tmp_path / "last.safetensors").about["epoch"] == 2
    found = [line for line in caplog.messages if "cannot be the best" in line]
    assert [line[: len("epoch 1")] for line in found] == ["epoch 1", "epoch 3"]
    assert all(f"not finite on {images} of 9 images" in line for line in found)


def test_a_run_without_a_finite_epoch_ends_in_an_error(tiny_digits, tmp_path):
    training = with_bad_epochs(build(tiny_config(tiny_digits, tmp_path, **SMALL)), range(3))
    with pytest.raises(FloatingPointError, match=r"the validation loss is not finite after any of the 3 epochs"):
        fit(training)
    assert (tmp_path / "last.safetensors").exists()
    assert not (tmp_path / "best.safetensors").exists()


def test_a_buffer_that_is_not_finite_stops_the_run(tiny_digits, tmp_path):
    """Training uses the statistics of the batch, so its loss stays finite; evaluation uses the running ones."""
    # In the last block, the class token that is read does not depend on the patches.
    training = build(tiny_config(tiny_digits, tmp_path, **SMALL | {"model_args": {"depth": 2}}))
    name, value = next((name, each) for name, each in training.state.model.named_buffers() if "running_var" in name)
    value[2] = torch.nan
    words = rf"{name} is not finite after epoch 1: the model's output is not finite on 9 of 9 images"
    with pytest.raises(FloatingPointError, match=words):
        fit(training)
    assert training.state.epoch == 0
    assert not (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("losses", "best"), [((NAN, 1.0, 2.0), 2), ((1.0, NAN, NAN), 0), ((NAN, NAN, NAN), 2), ((2.0, math.inf, 1.0), 2)]
)
def test_the_best_row_of_a_log(losses, best):
    """With accuracies of 50, 40 and 60; without a finite loss, the highest of them."""
    rows = [
        {"epoch": epoch, "test_loss": loss, "test_acc1": acc1, "train_loss": 1.0}
        for epoch, (loss, acc1) in enumerate(zip(losses, (50.0, 40.0, 60.0), strict=True))
    ]
    assert RunResult.of(rows).best["epoch"] == best
