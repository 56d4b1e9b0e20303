"""The loop: reproducibility, steps against closed forms, and the files of a run."""

import json
import shutil

import pytest
import torch
from tiny import STILL, tiny_config, train
from torch import nn

from localvit.checkpoints import read_checkpoint
from localvit.data.datasets import open_images
from localvit.data.images import DataError, UnreadableImage
from localvit.evaluation.evaluate import evaluate
from localvit.inference.runner import InferenceOptions, load_model
from localvit.train.builder import build
from localvit.train.loop import fit
from localvit.train.run_folder import save_epoch

KEYS = ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]


def trained(config):
    fit(build(config))
    checkpoint = read_checkpoint(config.output_dir / "last.safetensors")
    return checkpoint.raw, checkpoint.ema, (config.output_dir / "log.txt").read_text()


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_repeated_runs_are_bit_exact_with_any_number_of_workers(tiny_digits, tmp_path):
    """With all augmentation, which uses the generators of Python, NumPy and torch."""
    raw, ema, log = trained(tiny_config(tiny_digits, tmp_path / "once"))
    for folder, changes in (("again", {}), ("workers", {"workers": 2})):
        torch.rand(17)  # earlier random numbers must not matter
        raw_again, ema_again, log_again = trained(tiny_config(tiny_digits, tmp_path / folder, **changes))
        assert same_bits(raw, raw_again), folder
        assert same_bits(ema, ema_again), folder
        assert log == log_again, folder
    raw_other, _, _ = trained(tiny_config(tiny_digits, tmp_path / "other", seed=1))
    assert not same_bits(raw, raw_other)


def test_each_epoch_has_another_order_and_each_image_once(tiny_digits, tmp_path):
    batches = build(tiny_config(tiny_digits, tmp_path, batch_size=13, **STILL)).batches
    orders = []
    for epoch in (0, 1):
        batches.order.epoch = epoch
        orders.append([index for _, index, _ in batches.order])
        assert sorted(orders[-1]) == list(range(39))
    assert orders[0] != orders[1]
    first, second = (next(batches.epoch(epoch))[0] for epoch in (0, 1))
    assert not torch.equal(first, second)


def one_step(tiny_digits, tmp_path, **changes):
    """Parameters before and after an epoch of one step, and the training."""
    training = build(tiny_config(tiny_digits, tmp_path, epochs=1, warmup_epochs=0, batch_size=20, **STILL | changes))
    before = {key: value.detach().clone() for key, value in training.state.model.state_dict().items()}
    fit(training)
    return before, training.state.model.state_dict(), training


def test_gradients_are_clipped_to_the_norm(tiny_digits, tmp_path):
    """SGD without nesterov: the first step is the rate times the gradient."""
    before, after, training = one_step(tiny_digits, tmp_path, opt="momentum", lr=2.0, weight_decay=0.0, clip_grad=0.25)
    names = [name for name, _ in training.state.model.named_parameters()]
    moved = torch.cat([(after[name] - before[name]).double().flatten() for name in names]).norm().item()
    # Rate 2 * 20 / 512; the difference of float32 weights near 1 is off by 6e-8 each, over 7e5 of them.
    assert moved == pytest.approx(2.0 * 20 / 512 * 0.25, rel=1e-2)


def test_the_moving_average_after_one_step(tiny_digits, tmp_path):
    before, after, _ = one_step(tiny_digits, tmp_path, ema_decay=0.75)
    averaged = read_checkpoint(tmp_path / "last.safetensors").ema
    for key, value in after.items():
        if value.is_floating_point():
            # float32 rounding of weights and statistics around 1
            torch.testing.assert_close(averaged[key], 0.75 * before[key] + 0.25 * value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(averaged["head.weight"], after["head.weight"])


def test_the_logged_loss_is_that_of_the_batch(tiny_digits, tmp_path):
    """The first loss against torch's on the same batch, from an untrained model."""
    changes = dict(epochs=1, warmup_epochs=0, batch_size=20, label_smoothing=0.0, drop_path_rate=0.0, **STILL)
    (row,) = train(tiny_config(tiny_digits, tmp_path / "run", **changes))
    fresh = build(tiny_config(tiny_digits, tmp_path / "fresh", **changes))
    ((images_BCHW, labels_B),) = fresh.batches.epoch(0)
    assert len(labels_B.unique()) == 3
    logits_BM = fresh.state.model.double().train()(images_BCHW.double())
    # float32 training against float64
    assert row["train_loss"] == pytest.approx(nn.functional.cross_entropy(logits_BM, labels_B).item(), rel=1e-4)


def test_evaluating_the_checkpoint_gives_the_numbers_of_the_log(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path)
    fit(build(config))
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert [row["epoch"] for row in rows] == [0, 1]

    ready = load_model(str(tmp_path / "last.safetensors"))
    assert ready.class_names == ["0", "1", "2"]
    assert (ready.preprocessing.input_size, ready.preprocessing.crop_pct) == ((32, 32), 1.0)
    images = open_images("DIGITS", tiny_digits)
    options = InferenceOptions(batch_size=5, workers=0, device=torch.device("cpu"))
    result = evaluate(ready.model, images, ready.preprocessing, options, class_names=ready.class_names)
    assert result.acc1 == rows[1]["test_acc1"]
    # Another batch size sums float32 products in another order.
    assert result.loss == pytest.approx(rows[1]["test_loss"], rel=1e-4)

    about = read_checkpoint(tmp_path / "last.safetensors").about
    assert about["metrics"] == rows[1]
    assert about["test_images"] == len(images)
    assert type(config)(**about["config"]) == config
    assert rows[0]["n_parameters"] == sum(parameter.numel() for parameter in ready.model.parameters())


def test_best_is_the_first_epoch_with_the_highest_accuracy(tiny_digits, tmp_path):
    training = build(tiny_config(tiny_digits, tmp_path))
    for epoch, acc1 in enumerate((40.0, 70.0, 70.0, 60.0)):
        training.state.finish_epoch({"epoch": epoch, "test_acc1": acc1}, {})
        save_epoch(training.state, tmp_path, training.describe())
    assert read_checkpoint(tmp_path / "best.safetensors").about["epoch"] == 1
    assert read_checkpoint(tmp_path / "last.safetensors").about["epoch"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "last.safetensors", "log.txt"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(tiny_digits, tmp_path, dtype):
    before, after, _ = one_step(tiny_digits, tmp_path, dtype=dtype, clip_grad=1.0, input_size=(8,))
    assert after["head.weight"].dtype == torch.float32
    assert after["head.weight"].isfinite().all()
    assert not torch.equal(before["head.weight"], after["head.weight"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, tiny_digits, workers):
    root = tmp_path / "digits"
    shutil.copytree(tiny_digits, root)
    bad = min((root / "train" / "1").iterdir())
    bad.write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=rf"{bad.name}.*--skip-unreadable"):
        fit(build(tiny_config(root, tmp_path / "run", batch_size=38, workers=workers)))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_left_out_as_if_they_did_not_exist(tmp_path, tiny_digits, workers, caplog):
    """The same weights, to the last bit, as those of a run on a folder without the files."""
    damaged, cleaned = tmp_path / "damaged", tmp_path / "cleaned"
    for root in (damaged, cleaned):
        shutil.copytree(tiny_digits, root)
        for split in ("train", "val"):
            bad = min((root / split / "1").iterdir())
            bad.write_bytes(b"no image") if root == damaged else bad.unlink()
    weights = []
    for root in (damaged, cleaned):
        skip = root == damaged
        training = build(tiny_config(root, tmp_path / f"run_{skip}", epochs=1, workers=workers, skip_unreadable=skip))
        fit(training)
        weights.append(training.state.model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    left_out = [record.message for record in caplog.records if record.message.startswith("left out")]
    assert len(left_out) == 2
    assert all("cannot be read as an image" in message for message in left_out)


def test_a_data_set_without_readable_images_is_refused(tmp_path, tiny_digits):
    root = tmp_path / "digits"
    shutil.copytree(tiny_digits, root)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the .* images can be read"):
        build(tiny_config(root, tmp_path / "run", workers=0, skip_unreadable=True))
