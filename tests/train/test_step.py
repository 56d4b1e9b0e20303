"""A training step: options that must not change its result, and options that must."""

import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from tiny import STILL, tiny_config, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

import localvit
import localvit.train.step as step_module
from localvit.checkpoints import read_checkpoint, save_checkpoint
from localvit.train.builder import build
from localvit.train.loop import fit
from localvit.train.step import train_step

DETERMINISTIC = STILL | {
    "label_smoothing": 0.0,
    "drop_path_rate": 0.0,
    "opt": "momentum",
    "lr": 0.5,
    "weight_decay": 0.0,
}


class Counting(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.is_paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += not self.is_paused
        return function(*args, **(kwargs or {}))

    def pausing_in(self, function):
        """The function, whose calls are not counted."""

        def uncounted(*args, **kwargs):
            self.is_paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self.is_paused = False

        return uncounted


def after_one_step(tiny_digits, folder, **changes):
    """The loss of the first step, and the weights after it in float64."""
    training = build(tiny_config(tiny_digits, folder, **DETERMINISTIC | changes))
    result = train_step(training, training.device_batches(0), stop=False)
    return result.loss, {name: value.double() for name, value in training.state.model.named_parameters()}, training


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"channels_last": True}, 1e-5),
        ({"grad_checkpointing": True}, 1e-6),
        ({"compile": True}, 1e-4),
        ({"ema_on_cpu": True}, 0.0),
    ],
    ids=["channels_last", "grad_checkpointing", "compile", "ema_on_cpu"],
)
def test_options_that_do_not_change_the_result(tiny_digits, tmp_path, monkeypatch, changes, tolerance):
    """Tolerances above 0 are for float32 sums in another order."""
    # Generating code takes a minute; `tests/models` and `tests/inference` do it for one block.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    small = {"batch_size": 6, "model_args": {"depth": 1}}
    expected_loss, expected, _ = after_one_step(tiny_digits, tmp_path / "plain", **small)
    loss, weights, _ = after_one_step(tiny_digits, tmp_path / "other", **small, **changes)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_accumulated_gradients_are_those_of_one_batch(tiny_digits, tmp_path):
    """With BatchNorm in evaluation mode, because its statistics are per batch."""
    found = []
    for batch_size, grad_accum in ((12, 1), (4, 3)):
        changes = DETERMINISTIC | {"batch_size": batch_size, "grad_accum": grad_accum}
        training = build(tiny_config(tiny_digits, tmp_path / str(grad_accum), **changes))
        for module in training.state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False
        result = train_step(training, training.device_batches(0), stop=False)
        weights = torch.cat([each.detach().double().flatten() for each in training.state.model.parameters()])
        found.append((result.loss, weights, training.steps_per_epoch, training.images_per_step))
    (loss, weights, steps, images), (loss_in_parts, weights_in_parts, steps_in_parts, images_in_parts) = found
    # float32 sums in another order
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(weights_in_parts, weights, rtol=1e-5, atol=1e-6)
    assert steps == steps_in_parts == 3
    assert images == images_in_parts == 12


def test_class_weights_are_inverse_to_the_number_of_images(tiny_digits, tmp_path):
    """Classes with 13, 7 and 3 images; the mean weight is 1."""
    root = tmp_path / "digits"
    shutil.copytree(tiny_digits, root)
    for digit, count in ((1, 7), (2, 3)):
        for path in sorted((root / "train" / str(digit)).iterdir())[count:]:
            path.unlink()
    config = tiny_config(root, tmp_path / "run", batch_size=6, class_weights="balanced", **STILL, label_smoothing=0.0)
    training = build(config)
    logits_BM = torch.randn(6, 3, dtype=torch.float64)
    labels_B = torch.tensor([0, 1, 2, 2, 0, 1])
    inverse = np.array([1 / 13, 1 / 7, 1 / 3])
    weights = inverse / inverse.mean()
    own = -logits_BM.log_softmax(1)[range(6), labels_B].numpy()
    expected = (weights[labels_B] * own).sum() / weights[labels_B].sum()
    # The weights are float32.
    assert training.criterion(None, logits_BM.float(), labels_B).item() == pytest.approx(expected, rel=1e-5)


def test_resplit_leaves_the_first_of_three_repeats_unerased(tiny_digits, tmp_path):
    changes = STILL | {"repeated_aug": True, "random_erasing": 1.0, "resplit": True}
    images = build(tiny_config(tiny_digits, tmp_path, **changes)).batches.images
    erased = [
        any(isinstance(step, transforms.RandomErasing) or type(step).__name__ == "RandomErasing" for step in steps)
        for steps in (images.first.transform.transforms, images.repeated.transform.transforms)
    ]
    assert erased == [False, True]
    # Erased pixels are random numbers, all different; a digit has many equal pixels in its black background.
    distinct = [len(images[(0, 5, repeat)][0].unique()) for repeat in (0, 1, 2)]
    assert distinct[0] < min(distinct[1:])


def test_early_stopping(tiny_digits, tmp_path, caplog):
    """With a tiny learning rate, no epoch is better than the first."""
    settings = {"epochs": 9, "early_stopping": 2, "lr": 1e-9, "min_lr": 0.0, "warmup_epochs": 0, "ema_decay": None}
    rows = train(tiny_config(tiny_digits, tmp_path, **settings))
    best = max(rows, key=lambda row: row["test_acc1"])["epoch"]
    assert len(rows) == best + 3 < 9
    assert any("no better Acc@1 for 2 epochs" in line for line in caplog.messages)


def test_distillation_with_alpha_1_trains_only_the_distillation_head(tiny_digits, tmp_path):
    """The checkpoint contains the student only."""
    teacher = localvit.create_model("localvit_nano_patch4_32", num_classes=3)
    save_checkpoint(teacher, tmp_path / "teacher.safetensors", class_names=["0", "1", "2"])
    config = tiny_config(
        tiny_digits,
        tmp_path / "run",
        model_args={"distilled": True},
        distillation="hard",
        distillation_alpha=1.0,
        teacher=str(tmp_path / "teacher.safetensors"),
        epochs=1,
        warmup_epochs=0,
        weight_decay=0.0,
    )
    training = build(config)
    before = {name: value.clone() for name, value in training.state.model.named_parameters()}
    fit(training)
    after = read_checkpoint(tmp_path / "run" / "last.safetensors").raw
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(after["head_dist.weight"], before["head_dist.weight"])
    assert after.keys() == training.state.model.state_dict().keys()


def test_operations_outside_the_passes_do_not_grow_with_the_model(tiny_digits, tmp_path, monkeypatch):
    """Copies of buffers, the update and the moving average: as many calls for two blocks as for one.

    On a GPU each call is a launch, which takes longer than the work of most of them.
    """
    counts = {}
    for depth in (1, 2):
        config = tiny_config(tiny_digits, tmp_path / str(depth), model_args={"depth": depth}, clip_grad=0.5)
        training = build(config)
        counted = Counting()
        monkeypatch.setattr(step_module, "_forward_backward", counted.pausing_in(step_module._forward_backward))
        batches = training.device_batches(0)
        train_step(training, batches, stop=False)  # the optimizer allocates its state
        counted.calls.clear()
        with counted:
            assert train_step(training, batches, stop=False).nonfinite is None
        monkeypatch.undo()
        counts[depth] = counted.calls
    assert counts[2] == counts[1]
    assert counts[1]["aten._foreach_copy_.default"] == 3  # buffers in float32 and int64; the average's in int64
    assert counts[1]["aten._foreach_lerp_.Scalar"] == 1
