"""Training on images in memory (--cache): the same run however it is interrupted, and what is refused."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_resume import Interrupting, outcome, run_config
from tiny import STILL, same, tiny_config, train

from localvit.data.images import DataError
from localvit.evaluation.evaluate import evaluate
from localvit.train.builder import build
from localvit.train.dry_run import dry_run
from localvit.train.loop import Stopped, fit
from localvit.train.nonfinite import explain
from localvit.train.run_folder import STATE, read_state
from localvit.train.step import StepResult
from processes import run_localvit, start_group, status_of


@pytest.fixture(scope="module")
def uninterrupted(tiny_digits, tmp_path_factory):
    """An uninterrupted run of 3 epochs with 3 steps, with all random augmentation."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    fit(build(run_config(tiny_digits, folder, cache=True)))
    return outcome(folder)


@pytest.mark.parametrize(("call", "workers"), [(0, 0), (3, 2)])
def test_a_resumed_run_is_bit_exact(tiny_digits, tmp_path, uninterrupted, call, workers):
    config = run_config(tiny_digits, tmp_path, cache=True, workers=workers, checkpoint_steps=None)
    with pytest.raises(Stopped):
        fit(replace(build(config), criterion=Interrupting(call, signal.SIGTERM)))
    assert 0 < read_state(tmp_path / STATE)["localvit"]["progress"]["step"] < 3  # within an epoch
    fit(build(config, resume="auto"))
    assert same(outcome(tmp_path), uninterrupted)


def test_without_augmentation_the_run_is_that_without_the_cache(tiny_digits, tmp_path):
    """No padding, so that the crop is the whole image. The same bits, also of the evaluation."""
    settings = STILL | {"model_args": {"depth": 2}}
    rows = []
    for cache in (False, True):
        training = build(tiny_config(tiny_digits, tmp_path / str(cache), cache=cache, **settings))
        images = training.batches.images
        if cache:
            images.augment._on_bytes[0].padding = 0
        else:
            images.repeated.transform.transforms[0].crop.padding = 0
        fit(training)
        rows.append(training.state.rows)
        weights = training.state.model.eval()
        evaluated = evaluate(weights, training.val_images, training.preprocessing, class_names=training.class_names)
        assert evaluated.loss == rows[-1][-1]["test_loss"]
    assert same(rows[0], rows[1])


def test_processes_see_the_images_that_one_process_sees(tiny_digits, tmp_path):
    """The same global batch, BatchNorm over all of it: equal to rounding."""
    changes = {"cache": True, "mixup": 0.0, "cutmix": 0.0, "drop_path_rate": 0.0, "sync_bn": True, "opt": "momentum"}
    changes |= {"lr": 0.5, "epochs": 1, "model_args": {"depth": 1}}
    one = train(tiny_config(tiny_digits, tmp_path / "one", batch_size=12, **changes))
    config = tiny_config(tiny_digits, tmp_path / "two", batch_size=6, **changes)
    file, err = tmp_path / "c.yaml", tmp_path / "err"
    file.write_text(str(config))
    group = start_group(2, run_localvit, "train", "--config", file, out=tmp_path / "out", err=err)
    assert [status_of(each) for each in group] == [0, 0], err.read_text()
    (row,) = [json.loads(line) for line in (config.output_dir / "log.txt").read_text().splitlines()]
    for name in ("train_loss", "test_loss"):
        assert abs(row[name] - one[0][name]) < 1e-4


def test_gradients_accumulate_and_a_dry_run_works(tiny_digits, tmp_path):
    training = build(tiny_config(tiny_digits, tmp_path, cache=True, grad_accum=2, batch_size=6))
    assert "for training" in dry_run(training)["images"]
    assert not list(tmp_path.iterdir())


def test_the_images_of_a_step_that_is_not_finite_are_named(tiny_digits, tmp_path):
    training = build(tiny_config(tiny_digits, tmp_path, cache=True, **STILL))
    name = training.batches.batch(0, 0)[2][3]
    images = training.batches.images.images
    index = next(number for number in range(len(images)) if images.name(number) == name)
    augment = training.batches.images.augment

    def with_infinity(pixels_BCHW, keys_B, is_erasable_B):
        rows = (pixels_BCHW == images.pixels_NCHW[index]).flatten(1).all(1)
        return augment(pixels_BCHW, keys_B, is_erasable_B).masked_fill(rows[:, None, None, None], float("inf"))

    training.batches.images.augment = with_infinity
    text = explain(training, StepResult(loss=float("nan"), stop=False, nonfinite="the loss is nan"))
    assert text.endswith(f"the augmentation is the first whose output is not finite, on {name}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_augment": "v0"},
            r"^cache: AutoAugment has no form for many images at once: turn it off \(--no-cache\), or choose",
        ),
        ({"input_size": (48,)}, r"^cache: .* of at most 32 pixels, and the input size is 48 x 48: turn it off"),
    ],
)
def test_what_the_cache_does_not_support_is_refused(tiny_digits, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(tiny_digits, tmp_path, cache=True, **changes))


def test_images_of_several_sizes_are_refused(tiny_digits, tmp_path):
    shutil.copytree(tiny_digits, tmp_path / "data")
    Image.new("L", (8, 24)).save(tmp_path / "data" / "train" / "2" / "tall.png")
    with pytest.raises(DataError, match=r"and 2/tall.png has 96 x 32: leave out --cache"):
        build(tiny_config(tmp_path / "data", tmp_path / "run", data_set="FOLDER", cache=True))
