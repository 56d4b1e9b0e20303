"""Helpers that build small data sets and read the findings of a check."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from localvit.dataset_check.report import CheckReport

GOOD = ("train/ape/1", "train/ape/2", "train/bat/3", "train/bat/4", "val/ape/5", "val/bat/6")
"""The images of a data set without problems; image number i is `scene(i)`."""


def scene(seed: int, width: int = 67, height: int = 53) -> Image.Image:
    """An image with distinct details everywhere, like a photograph."""
    patches = np.random.default_rng(seed).integers(0, 256, (17, 19, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def found(report: CheckReport) -> dict[str, list[tuple[str, ...]]]:
    return {finding.name: [location.paths for location in finding.locations] for finding in report.findings}


def notes(report: CheckReport) -> str:
    return "\n".join(location.note for finding in report.findings for location in finding.locations)


def several(root: Path, folder: str, count: int) -> None:
    for number in range(count):
        save(root / folder / f"more_{number}.png", scene(1000 + sum(os.fsencode(folder)) * 100 + number))


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
