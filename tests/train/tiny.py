"""A data set and a run small enough to repeat: 3 digits, 39 images to train on, 9 to evaluate on."""

import shutil
from pathlib import Path

import pytest
import torch

from localvit.data.digits import write_digits
from localvit.train.config import TrainConfig

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
"""No augmentation but the shifted crop."""


def write_some_digits(root: Path, *, classes: int, train: int, val: int) -> Path:
    """The first `classes` digits, with `train` and `val` images each."""
    whole = write_digits(root / "whole")
    for split, count in (("train", train), ("val", val)):
        for digit in range(classes):
            folder = root / "some" / split / str(digit)
            folder.mkdir(parents=True)
            for path in sorted((whole / split / str(digit)).iterdir())[:count]:
                shutil.copy(path, folder)
    return root / "some"


def tiny_config(data_path: Path, output_dir: Path, **changes) -> TrainConfig:
    """Every augmentation at its published strength, and two steps an epoch."""
    settings = {
        "model": "localvit_nano_patch4_32",
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


def skip_without_plateau() -> None:
    """timm's plateau of before 2026 hands torch an argument that it no longer takes."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        PlateauLRScheduler(optimizer)
    except TypeError:
        pytest.skip("this version of timm's plateau does not run on this version of torch")
