"""A small data set and settings for short runs: 3 digits, 39 training images, 9 validation images."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from localvit.data.digits import write_digits
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.loop import fit
from localvit.train.state import Row

from timm.scheduler import PlateauLRScheduler  # isort: skip  (after localvit)

STILL = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "hflip": 0.0,
    "auto_augment": None,
    "color_jitter": 0.0,
    "random_erasing": 0.0,
    "repeated_aug": False,
}
"""No augmentation except the padded random crop."""


@cache
def _all_digits() -> Path:
    """The whole data set, written once in each process of the suite: its 1,797 files take a second or more."""
    folder = tempfile.mkdtemp(prefix="localvit-digits-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_digits(Path(folder) / "digits")


def write_some_digits(root: Path, *, classes: int, train: int, val: int) -> Path:
    """The first `classes` digits, with `train` and `val` images each."""
    whole = _all_digits()
    for split, count in (("train", train), ("val", val)):
        for digit in range(classes):
            folder = root / "some" / split / str(digit)
            folder.mkdir(parents=True)
            for path in sorted((whole / split / str(digit)).iterdir())[:count]:
                shutil.copy(path, folder)
    return root / "some"


def tiny_config(data_path: Path, output_dir: Path, **changes) -> TrainConfig:
    """Published augmentation, two steps per epoch, and two blocks: neither model nor steps depend on their number."""
    settings = {
        "model": "localvit_nano_patch4_32",
        "model_args": {} if "model" in changes else {"depth": 2},
        "data_set": "DIGITS",
        "data_path": data_path,
        "output_dir": output_dir,
        "epochs": 2,
        "batch_size": 14,
        "lr": 0.02,
        "warmup_epochs": 1,
        "warmup_lr": 1e-3,
        "ema_decay": 0.9,
        "workers": 0,
        "device": "cpu",
    }
    return TrainConfig(**settings | changes)


def train(config: TrainConfig, **arguments) -> list[Row]:
    """Build and train; returns the rows of the log."""
    training = build(config, **arguments)
    fit(training)
    return training.state.rows


def skip_without_plateau() -> None:
    """The plateau schedule of older timm passes torch an argument that newer torch does not accept."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        PlateauLRScheduler(optimizer)
    except TypeError:
        pytest.skip("the plateau schedule of this version of timm does not work with this version of torch")


def same(one, other) -> bool:
    """Whether two trees of plain values and tensors are bit-exact."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
