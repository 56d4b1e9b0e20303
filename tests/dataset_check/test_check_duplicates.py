"""Identical images and near duplicates are found, and no others."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import found, notes, save, scene
from PIL import Image, ImageEnhance

from localvit.dataset_check.report import check_folder

Build = Callable[[Path], object]


def copy(root: Path, path: str, seed: int, **options) -> None:
    save(root / path, scene(seed), **options)


def near(seed: int) -> Image.Image:
    return ImageEnhance.Brightness(scene(seed).resize((59, 47))).enhance(0.9)


def bluer(seed: int) -> Image.Image:
    """Other pixels with the same gray levels: one level of blue adds 0.114 levels of gray."""
    gray = np.asarray(scene(seed).convert("L")).clip(0, 254)
    return Image.fromarray(np.stack([gray, gray, gray + 1], axis=2))


def without_val(root: Path) -> None:
    (root / "val").rename(root.parent / "val")
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    (root / "train").rmdir()


def equal_in_gray(root: Path) -> None:
    save(root / "train/ape/x.png", scene(50).convert("L").point(lambda level: min(level, 254)))
    save(root / "val/ape/x.png", bluer(50))


def shades(root: Path) -> None:
    """One is twice as bright as the other, so both have the same hash, even after rounding."""
    for split, shade in (("train", 45), ("val", 90)):
        save(root / split / "ape" / "x.png", Image.new("L", (67, 53), shade))


FIRST = "train/ape/1.png"
DUPLICATES: dict[str, tuple[Build, dict[str, list[tuple[str, ...]]], str]] = {
    "the same bytes": (
        lambda root: copy(root, "val/ape/x.png", 0),
        {"same-across-splits": [(FIRST, "val/ape/x.png")]},
        "",
    ),
    "the same pixels": (
        lambda root: copy(root, "val/bat/x.bmp", 0),
        {"same-across-splits": [(FIRST, "val/bat/x.bmp")]},
        "in different classes",
    ),
    "in three splits": (
        lambda root: [copy(root, f"{split}/ape/x.png", 99) for split in ("train", "val", "test")],
        {"same-across-splits": [("train/ape/x.png", "val/ape/x.png", "test/ape/x.png")]},
        "",
    ),
    "in val and test": (
        lambda root: copy(root, "test/ape/x.png", 4),
        {"same-across-splits": [("val/ape/5.png", "test/ape/x.png")]},
        "",
    ),
    "twice in one class": (
        lambda root: copy(root, "train/ape/x.png", 0),
        {"same-twice": [(FIRST, "train/ape/x.png")]},
        "",
    ),
    "in two classes": (
        lambda root: copy(root, "train/bat/x.png", 0),
        {"same-in-classes": [(FIRST, "train/bat/x.png")]},
        "",
    ),
    "near": (
        lambda root: save(root / "val/ape/x.jpg", near(0)),
        {"near-across-splits": [("val/ape/x.jpg", FIRST)]},
        "of 256 bits",
    ),
    "near, in another class": (
        lambda root: save(root / "val/bat/x.jpg", near(0)),
        {"near-across-splits": [("val/bat/x.jpg", FIRST)]},
        "differ, in different classes",
    ),
    "near, in test, most similar first": (
        lambda root: [save(root / "test/ape/x.jpg", near(0)), save(root / "test/bat/y.jpg", scene(5), quality=95)],
        {"near-across-splits": [("test/bat/y.jpg", "val/bat/6.png"), ("test/ape/x.jpg", FIRST)]},
        "",
    ),
    "near, in train": (lambda root: save(root / "train/ape/x.jpg", near(0)), {}, ""),
    "near, in val": (lambda root: save(root / "val/ape/x.jpg", near(4)), {}, ""),
    "equal only in gray": (
        equal_in_gray,
        {"near-across-splits": [("val/ape/x.png", "train/ape/x.png")]},
        "0 of 256 bits",
    ),
    "mirrored": (
        lambda root: save(root / "val/ape/x.png", scene(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        {},
        "",
    ),
    "shades": (shades, {"blank": [("train/ape/x.png",), ("val/ape/x.png",)]}, ""),
    "twice, without splits": (
        lambda root: [copy(root, "train/ape/x.png", 0), without_val(root)],
        {"same-twice": [("ape/1.png", "ape/x.png")]},
        "",
    ),
    "near, without splits": (
        lambda root: [save(root / "train/ape/x.jpg", near(0)), without_val(root)],
        {"near-twice": [("ape/x.jpg", "ape/1.png")]},
        "",
    ),
}


@pytest.mark.parametrize("case", DUPLICATES)
def test_duplicates(root, case):
    build, expected, note = DUPLICATES[case]
    build(root)
    report = check_folder(root)
    assert found(report) == expected
    assert note in notes(report)
    for finding in report.findings:
        assert finding.severity == ("error" if finding.name == "same-across-splits" else "warning")


@pytest.mark.parametrize(
    ("change", "is_near"),
    [
        (lambda photo: photo.resize((photo.width // 2, photo.height // 2)), True),
        (lambda photo: photo.resize((224, 224), Image.Resampling.BILINEAR), True),
        (lambda photo: photo.convert("L").convert("RGB"), True),
        (lambda photo: ImageEnhance.Brightness(photo).enhance(1.2), True),
        (lambda photo: ImageEnhance.Contrast(photo).enhance(0.7), True),
        (lambda photo: photo.crop((6, 4, photo.width - 6, photo.height - 4)), True),
        (lambda photo: photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), False),
        (lambda photo: photo.crop((100, 100, photo.width, photo.height)), False),
    ],
    ids=["half size", "square", "gray", "brighter", "less contrast", "cropped by 1 %", "mirrored", "cropped by 16 %"],
)
def test_which_changes_of_a_photograph_are_near_duplicates(tmp_path, change, is_near):
    """The changes that NEAR_BITS documents, on scikit-learn's two photographs."""
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    for name, pixels in zip(("china", "flower"), photographs, strict=True):
        save(tmp_path / name / "before.png", Image.fromarray(pixels))
        save(tmp_path / name / "changed.jpg", change(Image.fromarray(pixels)), quality=60)
    pairs = [(f"{name}/changed.jpg", f"{name}/before.png") for name in ("china", "flower")]
    findings = found(check_folder(tmp_path))
    assert sorted(findings.pop("near-twice", [])) == (pairs if is_near else [])
    assert findings == {}
