"""Problems of the folder layout are found at the right location, and no others."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from data_sets import found, link, notes, save, scene, several

from localvit.data.images import DataError
from localvit.dataset_check.report import check_folder


def test_a_data_set_without_problems(root):
    report = check_folder(root)
    assert report.findings == []
    assert report.counts == {"train": {"ape": 2, "bat": 2}, "val": {"ape": 1, "bat": 1}}
    assert report.sizes == [(67, 53)] * 6


def test_class_folders_without_splits(root):
    report = check_folder(root / "train")
    assert report.findings == []
    assert report.counts == {"all": {"ape": 2, "bat": 2}}


Build = Callable[[Path], object]
FOLDERS: dict[str, tuple[Build, dict[str, list[tuple[str, ...]]], str]] = {
    "no train": (
        lambda root: (root / "train").rename(root / "training"),
        {"no-train": [(".",)], "beside-splits": [("training",)]},
        "",
    ),
    "no val": (
        lambda root: (root / "val").rename(root / "valid"),
        {"no-val": [(".",)], "beside-splits": [("valid",)]},
        "",
    ),
    "val without classes": (
        lambda root: (
            [path.rename(root / "val" / path.name) for path in root.glob("val/*/*.png")]
            + [path.rmdir() for path in root.glob("val/*") if path.is_dir()]
        ),
        {"no-images": [("val",)], "outside-classes": [("val/5.png",), ("val/6.png",)]},
        "no class folders",
    ),
    "test without classes": (
        lambda root: save(root / "test" / "1.png", scene(99)),
        {"no-images": [("test",)], "outside-classes": [("test/1.png",)]},
        "",
    ),
    "hidden": (
        lambda root: [
            save(root / path, scene(99)) for path in ("train/.cat/1.png", "train/ape/.git/1.png", "val/ape/.1.png")
        ],
        {"hidden-folders": [("train/.cat",), ("train/ape/.git",)], "hidden-files": [("val/ape/.1.png",)]},
        "",
    ),
    "outside": (
        lambda root: [save(root / path, scene(99)) for path in ("1.png", "train/2.JPG")],
        {"outside-classes": [("1.png",), ("train/2.JPG",)]},
        "",
    ),
    "other extensions": (
        lambda root: [
            save(root / "train/ape/old.tga", scene(99)),
            save(root / "train/ape/drawing.gif", scene(98)),
            save(root / "train/ape/deep/no_extension", scene(99), format="PNG"),
            (root / "val/bat/phone.HEIC").write_bytes(b"not for PIL"),
            link(root / "train/ape/loop", "../ape"),
        ],
        {"other-extensions": [("train/ape/old.tga",), ("train/ape/deep/no_extension",), ("val/bat/phone.HEIC",)]},
        "",
    ),
    "no images at all": (
        lambda root: [
            (root / "train/ape/notes.txt").write_text("about apes"),
            (root / "train/ape/labels.csv").write_text("1,ape"),
            (root / "train/ape/._1.png").write_bytes(b"attributes"),
            (root / "train/ape/.DS_Store").write_bytes(b"\0"),
            os.mkfifo(root / "train/ape/pipe"),
            link(root / "train/ape/nowhere", "nothing"),
        ],
        {},
        "",
    ),
    "folders that are not classes": (
        lambda root: [
            save(root / "train/runs/train/curves.png", scene(99)),
            (root / "train/runs/train/last.safetensors").write_bytes(b""),
            save(root / "train/__MACOSX/ape/1.png", scene(98)),
            (root / "train/annotations").mkdir(),
            (root / "train/annotations/1.xml").write_text("<box/>"),
        ],
        {"not-classes": [("train/__MACOSX",), ("train/annotations",), ("train/runs",)]},
        "runs/train/last.safetensors",
    ),
    "parents of the class folders": (
        lambda root: [
            ((root / split / name).rename(root / split / "x") and (root / split / name).mkdir())
            or (root / split / "x").rename(root / split / name / "day")
            for split in ("train", "val")
            for name in ("ape", "bat")
        ],
        {"nested-classes": [("train/ape/day",), ("val/ape/day",)]},
        "",
    ),
    "unknown class": (
        lambda root: (root / "val/bat").rename(root / "val/Bat"),
        {"unknown-classes": [("val/Bat",)], "not-in-val": [("train/bat",)]},
        "1 image; did you mean 'bat'?",
    ),
    "only an empty folder in train": (
        lambda root: [(root / "train/cat").mkdir(), save(root / "val/cat/1.png", scene(99))],
        {"unknown-classes": [("val/cat",)], "empty-classes": [("train/cat",)]},
        "",
    ),
    "unknown class of test": (
        lambda root: save(root / "test/cat/1.png", scene(99)),
        {"unknown-classes": [("test/cat",)]},
        "",
    ),
    "empty in val": (
        lambda root: [(root / "val/cat").mkdir(), save(root / "train/cat/1.png", scene(99))],
        {"empty-classes": [("val/cat",)], "not-in-val": [("train/cat",)]},
        "",
    ),
    "one class": (
        lambda root: [(root / split / "bat").rename(root.parent / f"away_{split}") for split in ("train", "val")],
        {"one-class": [("train/ape",)]},
        "",
    ),
    "ten to one": (lambda root: several(root, "train/ape", 18), {}, ""),
    "more than ten to one": (lambda root: several(root, "train/ape", 19), {"imbalance": [("train/bat",)]}, "10 times"),
    "numbers in order": (
        lambda root: [
            several(root, f"{split}/{name}", 1) for split in ("train", "val") for name in ("02", "10", "c11", "d9")
        ],
        {},
        "",
    ),
    "numbers out of order": (
        lambda root: [several(root, f"{split}/{name}", 1) for split in ("train", "val") for name in ("1", "2", "10")],
        {"numeric-names": [("10", "2")]},
        "classes 1 and 2",
    ),
    "numbers in names": (
        lambda root: [
            several(root, f"{split}/{name}", 1) for split in ("train", "val") for name in ("c9", "c10", "d3")
        ],
        {"numeric-names": [("c10", "c9")]},
        "classes 2 and 3",
    ),
    "unusual names": (
        lambda root: [
            several(root, f"{split}/{os.fsdecode(name)}", 1)
            for split in ("train", "val")
            for name in (b"a b", "Zoë".encode(), b"caf\xe9")
        ],
        {},
        "",
    ),
}


def test_train_without_val_or_another_name_for_it_can_be_trained_on(root):
    """Training then uses part of train/, so this is not an error."""
    (root / "val").rename(root / "test")
    (finding,) = check_folder(root).findings
    assert (finding.name, finding.severity) == ("no-val", "warning")


ERRORS = {"no-train", "no-val", "no-images", "unknown-classes", "one-class"}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(root, case):
    build, expected, note = FOLDERS[case]
    build(root)
    report = check_folder(root)
    assert found(report) == expected
    assert note in notes(report)
    for finding in report.findings:
        is_error = finding.name in ERRORS and finding.locations[0].paths != ("test",)
        assert finding.severity == ("error" if is_error else "warning")


@pytest.mark.parametrize("name", ["none", "file"])
def test_not_a_folder(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/{name}"):
        check_folder(tmp_path / name)


def test_the_parent_of_the_class_folders(root):
    save(root / "photos" / "ape" / "1.png", scene(1))
    save(root / "photos" / "bat" / "2.png", scene(2))
    for split in ("train", "val"):
        (root / split).rename(root.parent / split)
    assert found(check_folder(root)) == {"one-class": [("photos",)]}
