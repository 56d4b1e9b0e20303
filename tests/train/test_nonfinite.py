"""A loss that is not finite: nothing is changed, everything is said, and a few may be skipped."""

import shutil

import pytest
import torch
from PIL import Image
from tiny import STILL, tiny_config

from localvit.train.build import build
from localvit.train.loop import MOST_SKIPS, fit
from localvit.train.nonfinite import explain
from localvit.train.run_folder import STATE, read_state


@pytest.fixture
def one_white(tiny_digits, tmp_path):
    """The digits, one of them a white image; and its name."""
    root = tmp_path / "digits"
    shutil.copytree(tiny_digits, root)
    white = min((root / "train" / "1").iterdir())
    Image.new("RGB", (32, 32), "white").save(white)
    return root, f"1/{white.name}"


def allergic(training):
    """Make the model's patch embedding give NaN for a white image."""

    def sneeze(module, inputs, output):
        white = inputs[0].mean((1, 2, 3)) > 1
        return torch.where(white.view(-1, 1, 1, 1), torch.nan, output)

    training.state.model.patch_embed.register_forward_hook(sneeze)
    return training


def bits(training):
    state = training.state
    return [value.clone() for value in (*state.model.state_dict().values(), *state.ema.module.state_dict().values())]


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_the_run_stops_before_anything_changes(one_white, tmp_path, grad_accum):
    root, name = one_white
    changes = {"epochs": 1, "warmup_epochs": 0, "batch_size": 12 // grad_accum, "grad_accum": grad_accum}
    config = tiny_config(root, tmp_path / "run", **changes, **STILL)
    training = allergic(build(config))
    number = next(
        number
        for number in range(len(training.batches))
        if any(name == shown for shown in training.batches.batch(0, number)[2])
    )
    step = number // grad_accum
    assert 0 < step < training.steps_per_epoch - 1 or grad_accum > 1  # the seed's order: not a trivial place
    with pytest.raises(FloatingPointError) as raised:
        fit(training)
    message = str(raised.value)
    assert f"the loss is nan in epoch 0, step {step}" in message
    assert f"patch_embed is the first whose output is not finite, on {name}" in message
    assert "--nonfinite skip" in message
    # What it left is what a run has that stops right there: every weight, statistic and average.
    assert all(value.isfinite().all() for value in bits(training))
    progress = read_state(tmp_path / "run" / STATE)["localvit"]["progress"]
    assert (progress["step"], len(progress["losses"])) == (step, step)
    before = bits(training)
    explain(training, float("nan"))
    assert all(map(torch.equal, bits(training), before))


def test_skipping_leaves_the_step_out(one_white, tmp_path):
    root, _ = one_white
    told = []
    config = tiny_config(root, tmp_path / "run", batch_size=6, nonfinite="skip", **STILL)
    training = allergic(build(config))
    rows = fit(training, remark=told.append)
    assert len(rows) == 2
    assert training.state.skipped == 2  # once in each epoch
    assert sum("step skipped" in line for line in told) == 2
    assert all(row["train_loss"] == row["train_loss"] for row in rows)
    assert all(value.isfinite().all() for value in bits(training))
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].endswith(",2")


def test_skipping_gives_up_after_ten_in_a_row(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", batch_size=2, nonfinite="skip", **STILL)
    training = build(config)
    training.state.model.head.register_forward_hook(lambda module, inputs, output: output * torch.inf)
    with pytest.raises(FloatingPointError, match=f"head is the first .* that is the {MOST_SKIPS}th such step in a row"):
        fit(training)
    assert training.state.step == MOST_SKIPS - 1


def test_weights_that_are_not_finite_are_not_saved(tiny_digits, tmp_path):
    training = build(tiny_config(tiny_digits, tmp_path / "run", **STILL))
    with torch.no_grad():
        training.state.model.blocks[1].attn.qkv.weight[3, 5] = torch.nan
    config = training.config
    with pytest.raises(FloatingPointError, match=r"blocks.1.attn.qkv.weight is not finite, from a gradient") as raised:
        fit(training)
    assert "is of before" in str(raised.value)
    assert config.output_dir.exists()
