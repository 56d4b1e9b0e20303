"""The check of a data set: whatever is wrong with a folder of pictures is found, where it is, and nothing else."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from localvit.data.check.inspection import inspect
from localvit.data.check.perceptual_hash import FLAT, NEAR_BITS, THUMBNAIL_SIDE, nearest_before, perceptual_hash
from localvit.data.check.report import CheckReport, check_folder
from localvit.data.pictures import DataError, FilePictures


def scene(seed: int, width: int = 67, height: int = 53) -> Image.Image:
    """A picture with a detail of its own in every place, as photographs have it."""
    patches = np.random.default_rng(seed).integers(0, 256, (17, 19, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, picture: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


GOOD = ("train/ape/1", "train/ape/2", "train/bat/3", "train/bat/4", "val/ape/5", "val/bat/6")


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set that nothing is wrong with."""
    for number, path in enumerate(GOOD):
        save(tmp_path / "data" / f"{path}.png", scene(number))
    return tmp_path / "data"


def found(report: CheckReport) -> dict[str, list[tuple[str, ...]]]:
    return {finding.name: [place.paths for place in finding.places] for finding in report.findings}


def notes(report: CheckReport) -> str:
    return "\n".join(place.note for finding in report.findings for place in finding.places)


def test_nothing_wrong(root):
    report = check_folder(root)
    assert report.findings == []
    assert report.counts == {"train": {"ape": 2, "bat": 2}, "val": {"ape": 1, "bat": 1}}
    assert report.sizes == [(67, 53)] * 6


def test_class_folders_alone(root):
    report = check_folder(root / "train")
    assert report.findings == []
    assert report.counts == {"all": {"ape": 2, "bat": 2}}


def several(root: Path, folder: str, count: int) -> None:
    for number in range(count):
        save(root / folder / f"more_{number}.png", scene(1000 + sum(os.fsencode(folder)) * 100 + number))


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


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
        {"no-pictures": [("val",)], "outside-classes": [("val/5.png",), ("val/6.png",)]},
        "no class folders",
    ),
    "test without classes": (
        lambda root: save(root / "test" / "1.png", scene(99)),
        {"no-pictures": [("test",)], "outside-classes": [("test/1.png",)]},
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
    "other endings": (
        lambda root: [
            save(root / "train/ape/moving.gif", scene(99)),
            save(root / "train/ape/deep/no_ending", scene(99), format="PNG"),
            (root / "val/bat/telephone.HEIC").write_bytes(b"not for PIL"),
            link(root / "train/ape/around", "../ape"),
        ],
        {"other-endings": [("train/ape/moving.gif",), ("train/ape/deep/no_ending",), ("val/bat/telephone.HEIC",)]},
        "",
    ),
    "no pictures at all": (
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
    "unknown class": (
        lambda root: (root / "val/bat").rename(root / "val/Bat"),
        {"unknown-classes": [("val/Bat",)], "not-in-val": [("train/bat",)]},
        "holds 1; did you mean 'bat'?",
    ),
    "known by an empty folder": (
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
    "names to be careful with": (
        lambda root: [
            several(root, f"{split}/{os.fsdecode(name)}", 1)
            for split in ("train", "val")
            for name in (b"a b", "Zoë".encode(), b"caf\xe9")
        ],
        {},
        "",
    ),
}


ERRORS = {"no-train", "no-val", "no-pictures", "unknown-classes", "one-class"}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(root, case):
    build, expected, note = FOLDERS[case]
    build(root)
    report = check_folder(root)
    assert found(report) == expected
    assert note in notes(report)
    for finding in report.findings:
        is_error = finding.name in ERRORS and finding.places[0].paths != ("test",)
        assert finding.severity == ("error" if is_error else "warning")


@pytest.mark.parametrize("name", ["none", "file"])
def test_no_folder_to_check(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/{name}"):
        check_folder(tmp_path / name)


def test_only_the_class_folder_above_is_given(root):
    save(root / "photos" / "ape" / "1.png", scene(1))
    save(root / "photos" / "bat" / "2.png", scene(2))
    for split in ("train", "val"):
        (root / split).rename(root.parent / split)
    assert found(check_folder(root)) == {"one-class": [("photos",)]}


def jpeg(root: Path) -> bytes:
    return save(root.parent / "whole.jpg", scene(77), quality=95).read_bytes()


UNREADABLE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "empty.jpg": (lambda path, root: path.write_bytes(b""), "an empty file"),
    "cut.jpg": (lambda path, root: path.write_bytes(jpeg(root)[:900]), "truncated"),
    "cut_late.jpg": (lambda path, root: path.write_bytes(jpeg(root)[:-40]), "truncated"),
    "text.jpg": (lambda path, root: path.write_text("not found"), "cannot identify"),
    "page.png": (lambda path, root: path.write_text("<!DOCTYPE html><html>404</html>"), "cannot identify"),
    "gone.jpg": (lambda path, root: path.symlink_to("nowhere.jpg"), "no such file"),
    "circle.jpg": (lambda path, root: path.symlink_to("circle.jpg"), "symbolic links"),
    "floats.tiff": (lambda path, root: Image.fromarray(np.ones((5, 7), np.float32)).save(path), "32-bit"),
    os.fsdecode(b"caf\xe9.jpg"): (lambda path, root: path.write_bytes(b"\xff\xd8\xff"), "cannot be read"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures(root, workers):
    for name, (make, _) in UNREADABLE.items():
        make(root / "train" / "ape" / name, root)
    report = check_folder(root, workers=workers)
    (finding,) = report.findings
    assert finding.name == "unreadable"
    assert finding.severity == "error"
    told = {place.paths[0]: place.note for place in finding.places}
    assert told.keys() == {f"train/ape/{name}" for name in UNREADABLE}
    for name, (_, reason) in UNREADABLE.items():
        assert reason in told[f"train/ape/{name}"]
    assert report.sizes == [(67, 53)] * 6
    assert report.counts["train"]["ape"] == 2 + len(UNREADABLE)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_pictures_without_permission(root):
    (root / "train/ape/1.png").chmod(0)
    assert found(check_folder(root)) == {"unreadable": [("train/ape/1.png",)]}


def turned_by(orientation: int) -> dict[str, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def veiled(opacity: int) -> Image.Image:
    picture = scene(99).convert("RGBA")
    picture.putalpha(Image.new("L", picture.size, opacity))
    return picture


SIXTEEN = Image.fromarray(np.random.default_rng(3).integers(0, 65536, (53, 67), dtype=np.uint16))
PICTURES: dict[str, tuple[str, Image.Image, dict, str | None]] = {
    "grey": ("x.png", scene(99).convert("L"), {}, None),
    "CMYK": ("x.jpg", scene(99).convert("CMYK"), {}, None),
    "palette": ("x.png", scene(99).quantize(200), {}, None),
    "half the usual side": ("x.png", scene(99, 40, 27), {}, None),
    "small": ("x.png", scene(99, 26, 31), {}, "small"),
    "four times as long": ("x.png", scene(99, 212, 53), {}, None),
    "longer": ("x.png", scene(99, 53, 213), {}, "elongated"),
    "large": ("x.png", scene(99, 4097, 4096), {"compress_level": 1}, "large"),
    "one shade": ("x.png", Image.new("RGB", (67, 53), "teal"), {}, "blank"),
    "turned": ("x.jpg", scene(99), turned_by(6), "turned"),
    "mirrored": ("x.png", scene(99), turned_by(2), "turned"),
    "upright": ("x.jpg", scene(99), turned_by(1), None),
    "orientation 0": ("x.jpg", scene(99), turned_by(0), None),
    "EXIF cut off": ("x.jpg", scene(99), {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}, "remarks"),
    "EXIF of nothing": ("x.png", scene(99), {"exif": b"Exif\0\0nothing at all"}, None),
    "opaque": ("x.png", veiled(255), {}, None),
    "transparent": ("x.png", veiled(254), {}, "unseen"),
    "transparent colour": ("x.png", scene(99).quantize(200), {"transparency": 7}, "unseen"),
    "animated": ("x.png", scene(99), {"save_all": True, "append_images": [scene(98)]}, "unseen"),
    "pages": ("x.tif", scene(99), {"save_all": True, "append_images": [scene(98)]}, "unseen"),
    "photograph and preview": (
        "x.jpg",
        scene(99),
        {"format": "MPO", "save_all": True, "append_images": [scene(98)]},
        None,
    ),
    "sixteen bits": ("x.png", SIXTEEN, {}, "unseen"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_single_pictures(root, case):
    name, picture, options, expected = PICTURES[case]
    save(root / "train" / "ape" / name, picture, **options)
    report = check_folder(root)
    assert found(report) == ({expected: [(f"train/ape/{name}",)]} if expected else {})
    assert all(finding.severity == "warning" for finding in report.findings)


@pytest.mark.parametrize(("side", "other_side"), [(23, 29), (37, 211)])
def test_small_only_beside_larger_ones(tmp_path, side, other_side):
    save(tmp_path / "ape" / "1.png", scene(0, side, side))
    for number, path in enumerate(("ape/2.png", "bat/1.png", "bat/2.png"), start=1):
        save(tmp_path / path, scene(number, other_side, other_side))
    assert check_folder(tmp_path).findings == []


def test_the_decoder_is_quoted_and_kept_quiet(root, capfd, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # PIL warns above it, and refuses at twice as many
    report = check_folder(root)
    assert found(report) == {"remarks": [(f"{path}.png",) for path in GOOD]}
    assert "exceeds limit of 3000 pixels" in notes(report)
    assert capfd.readouterr() == ("", "")


def copy(root: Path, path: str, seed: int, **options) -> None:
    save(root / path, scene(seed), **options)


def near(seed: int) -> Image.Image:
    return ImageEnhance.Brightness(scene(seed).resize((59, 47))).enhance(0.9)


def bluer(seed: int) -> Image.Image:
    """Other pixels, of the same grey: one level of blue counts 0.114 of grey's."""
    grey = np.asarray(scene(seed).convert("L")).clip(0, 254)
    return Image.fromarray(np.stack([grey, grey, grey + 1], axis=2))


def without_val(root: Path) -> None:
    (root / "val").rename(root.parent / "val")
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    (root / "train").rmdir()


def grey_alone(root: Path) -> None:
    save(root / "train/ape/x.png", scene(50).convert("L").point(lambda level: min(level, 254)))
    save(root / "val/ape/x.png", bluer(50))


def shades(root: Path) -> None:
    """Twice as light, and so, even in rounding, of the same hash."""
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
        "under different classes",
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
    "twice in a class": (
        lambda root: copy(root, "train/ape/x.png", 0),
        {"same-twice": [(FIRST, "train/ape/x.png")]},
        "",
    ),
    "in two classes": (
        lambda root: copy(root, "train/bat/x.png", 0),
        {"same-in-classes": [(FIRST, "train/bat/x.png")]},
        "",
    ),
    "nearly": (
        lambda root: save(root / "val/ape/x.jpg", near(0)),
        {"near-across-splits": [("val/ape/x.jpg", FIRST)]},
        "of 256 bits",
    ),
    "nearly, in another class": (
        lambda root: save(root / "val/bat/x.jpg", near(0)),
        {"near-across-splits": [("val/bat/x.jpg", FIRST)]},
        "differ, under different classes",
    ),
    "nearly, in test, the surest first": (
        lambda root: [save(root / "test/ape/x.jpg", near(0)), save(root / "test/bat/y.jpg", scene(5), quality=95)],
        {"near-across-splits": [("test/bat/y.jpg", "val/bat/6.png"), ("test/ape/x.jpg", FIRST)]},
        "",
    ),
    "nearly, in train": (lambda root: save(root / "train/ape/x.jpg", near(0)), {}, ""),
    "nearly, in val": (lambda root: save(root / "val/ape/x.jpg", near(4)), {}, ""),
    "equal in grey alone": (
        grey_alone,
        {"near-across-splits": [("val/ape/x.png", "train/ape/x.png")]},
        "0 of 256 bits",
    ),
    "mirrored": (
        lambda root: save(root / "val/ape/x.png", scene(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        {},
        "",
    ),
    "shades": (shades, {"blank": [("train/ape/x.png",), ("val/ape/x.png",)]}, ""),
    "twice, and to be split": (
        lambda root: [copy(root, "train/ape/x.png", 0), without_val(root)],
        {"same-twice": [("ape/1.png", "ape/x.png")]},
        "",
    ),
    "nearly, and to be split": (
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


def test_any_number_of_workers_tells_the_same(root):
    several(root, "train/ape", 41)
    copy(root, "val/bat/x.bmp", 0)
    save(root / "val/ape/x.jpg", near(1))
    (root / "val/ape/broken.png").write_bytes(b"")
    alone, together = (check_folder(root, workers=workers) for workers in (0, 3))
    assert alone.to_dict() == together.to_dict()
    assert found(alone).keys() == {"unreadable", "same-across-splits", "imbalance", "near-across-splits"}


def test_progress_counts_every_picture_once(root):
    several(root, "train/ape", 33)
    copy(root, "train/bat/x.png", 2)
    told = {}

    class Account:
        def __init__(self, title, total):
            told[title] = [total]
            self.title = title

        def __enter__(self):
            return told[self.title].append

        def __exit__(self, *_):
            pass

    check_folder(root / "train", progress=Account)
    assert {title: (total, sum(done)) for title, (total, *done) in told.items()} == {
        "look": (38, 38),
        "compare": (37, 37),
    }


def test_hash_is_the_signs_about_the_median_of_scipys_transform():
    fft = pytest.importorskip("scipy.fft")
    thumbnails = np.random.default_rng(0).integers(0, 256, (7, THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)
    bits = np.unpackbits(perceptual_hash(thumbnails).view(np.uint8), axis=1)
    assert bits.shape == (7, 256)
    for thumbnail, row in zip(thumbnails, bits, strict=True):
        frequencies = fft.dctn(thumbnail.astype(np.float64), type=2)[:16, :16].ravel()
        above = frequencies - np.median(frequencies)
        clear = np.abs(above) > 0.5  # float32 sums of 1,024 products of up to 255, times scipy's 4, round by up to 0.25
        assert clear.sum() > 250
        np.testing.assert_array_equal(row[clear], (above > 0)[clear])


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
    ids=["half", "square", "grey", "lighter", "flatter", "crop of a hundredth", "mirrored", "crop of a sixth"],
)
def test_photographs_near_and_far(tmp_path, change, is_near):
    """What NEAR_BITS promises, on scikit-learn's two photographs."""
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    for name, pixels in zip(("china", "flower"), photographs, strict=True):
        save(tmp_path / name / "as_it_was.png", Image.fromarray(pixels))
        save(tmp_path / name / "changed.jpg", change(Image.fromarray(pixels)), quality=60)
    pairs = [(f"{name}/changed.jpg", f"{name}/as_it_was.png") for name in ("china", "flower")]
    told = found(check_folder(tmp_path))
    assert sorted(told.pop("near-twice", [])) == (pairs if is_near else [])
    assert told == {}


def flipped(number: int, bits_of_words: tuple[int, ...]) -> int:
    """`number` with so many bits of each of its 64-bit words inverted."""
    for word, bits in enumerate(bits_of_words):
        number ^= ((1 << bits) - 1) << (64 * word + 5)
    return number


def test_nearest_equals_the_comparison_of_every_pair():
    rng = np.random.default_rng(0)
    numbers = [int.from_bytes(rng.bytes(32), "little") for _ in range(9001)]
    for place, (of, bits_of_words) in {
        4500: (3, (31, 0, 0, 0)),
        4501: (4, (8, 8, 8, 8)),  # 32 bits, one too many
        4502: (4099, (7, 8, 8, 8)),
        4503: (4502, (0, 1, 0, 0)),
        25: (20, (0, 0, 0, 9)),
        4504: (20, (1, 0, 0, 0)),  # and further from 25, which is compared at the same time
        8999: (4400, (0, 0, 8, 23)),
        9000: (8999, (0, 0, 0, 0)),
    }.items():
        numbers[place] = flipped(numbers[of], bits_of_words)
    hashes = np.frombuffer(b"".join(number.to_bytes(32, "little") for number in numbers), np.uint64).reshape(-1, 4)
    queries, candidates = np.arange(4490, 9001, 1)[[*range(70), -2, -1]], np.arange(0, 9001)
    expected = []
    for query in queries.tolist():
        bits, nearest = min(((numbers[query] ^ numbers[other]).bit_count(), other) for other in range(query))
        if bits <= NEAR_BITS:
            expected.append((query, nearest, bits))
    assert [pair[:2] for pair in expected] == [
        (4500, 3),
        (4502, 4099),
        (4503, 4502),
        (4504, 20),
        (8999, 4400),
        (9000, 8999),
    ]
    done: list[int] = []
    assert nearest_before(hashes, queries, candidates, done.append) == expected
    assert sum(done) == len(queries)
    some = np.array([4, 4400])
    assert nearest_before(hashes, queries, some) == [(8999, 4400, 31), (9000, 4400, 31)]


def test_contrast_of_the_thumbnail(tmp_path):
    levels = np.zeros((64, 64), np.uint8)
    levels[:, 32:] = 10
    save(tmp_path / "a" / "1.png", Image.fromarray(levels))
    seen = inspect(FilePictures(tmp_path, [("a/1.png", 0)], ["a"]), 0)
    # Halves of 0 and 10 deviate by 5; the column between them is blurred, which moves it by less than 1 / 32.
    assert seen.contrasts == pytest.approx([5], rel=1 / 32)
    assert FLAT < 5


def when_a_worker_waits(act: Callable[[int], None], pipe: Path) -> threading.Thread:
    """Call `act` with the id of the worker process that waits for the pipe to be written to."""

    def wait() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        (worker,) = multiprocessing.active_children()
        while True:  # a pipe can be opened for writing once it is read
            try:
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:
                time.sleep(0.01)
        act(worker.pid)
        time.sleep(0.2)  # so that the worker learns of what happened before it reads on
        os.close(writer)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture
def waiting(root) -> Path:
    """A data set whose decoding waits at a pipe that is called a picture."""
    os.mkfifo(root / "train" / "ape" / "waits.png")
    return root


def test_a_dying_worker_is_told(waiting):
    thread = when_a_worker_waits(lambda worker: os.kill(worker, signal.SIGKILL), waiting / "train/ape/waits.png")
    with pytest.raises(RuntimeError, match="died"):
        check_folder(waiting, workers=1)
    thread.join()


def test_an_interrupt_ends_the_workers_quietly(waiting, capfd):
    def interrupt(worker: int) -> None:
        os.kill(worker, signal.SIGINT)  # a terminal sends Ctrl-C to all processes
        os.kill(os.getpid(), signal.SIGINT)

    thread = when_a_worker_waits(interrupt, waiting / "train/ape/waits.png")
    with pytest.raises(KeyboardInterrupt):
        check_folder(waiting, workers=1)
    thread.join()
    assert multiprocessing.active_children() == []
    assert capfd.readouterr() == ("", "")
