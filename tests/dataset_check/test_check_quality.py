"""Problems of single images are found at the right location, and no others."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import GOOD, found, notes, save, scene
from PIL import Image

from localvit.dataset_check.report import check_folder


def jpeg(root: Path) -> bytes:
    return save(root.parent / "whole.jpg", scene(77), quality=95).read_bytes()


UNREADABLE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "empty.jpg": (lambda path, root: path.write_bytes(b""), "an empty file"),
    "cut.jpg": (lambda path, root: path.write_bytes(jpeg(root)[:900]), "truncated"),
    "cut_late.jpg": (lambda path, root: path.write_bytes(jpeg(root)[:-40]), "truncated"),
    "text.jpg": (lambda path, root: path.write_text("not found"), "cannot identify"),
    "page.png": (lambda path, root: path.write_text("<!DOCTYPE html><html>404</html>"), "cannot identify"),
    "gone.jpg": (lambda path, root: path.symlink_to("nowhere.jpg"), "no such file"),
    "loop.jpg": (lambda path, root: path.symlink_to("loop.jpg"), "symbolic links"),
    "pipe.jpg": (lambda path, root: os.mkfifo(path), "a named pipe"),
    "floats.tiff": (lambda path, root: Image.fromarray(np.ones((5, 7), np.float32)).save(path), "32-bit"),
    os.fsdecode(b"caf\xe9.jpg"): (lambda path, root: path.write_bytes(b"\xff\xd8\xff"), "cannot be read"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images(root, workers):
    for name, (make, _) in UNREADABLE.items():
        make(root / "train" / "ape" / name, root)
    report = check_folder(root, workers=workers)
    (finding,) = report.findings
    assert finding.name == "unreadable"
    assert finding.severity == "error"
    reasons = {location.paths[0]: location.note for location in finding.locations}
    assert reasons.keys() == {f"train/ape/{name}" for name in UNREADABLE}
    for name, (_, reason) in UNREADABLE.items():
        assert reason in reasons[f"train/ape/{name}"]
    assert report.sizes == [(67, 53)] * 6
    assert report.counts["train"]["ape"] == 2 + len(UNREADABLE)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read every file")
def test_images_without_permission(root):
    (root / "train/ape/1.png").chmod(0)
    assert found(check_folder(root)) == {"unreadable": [("train/ape/1.png",)]}


def test_a_folder_that_may_only_be_listed(root):
    (root / "train/ape/notes").write_text("about apes")
    (root / "train/ape").chmod(0o444)
    try:
        if os.access(root / "train/ape/1.png", os.R_OK):
            pytest.skip("this user can read every file")
        assert found(check_folder(root)) == {"unreadable": [("train/ape/1.png",), ("train/ape/2.png",)]}
    finally:
        (root / "train/ape").chmod(0o755)


def with_orientation(orientation: int) -> dict[str, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def with_opacity(opacity: int) -> Image.Image:
    image = scene(99).convert("RGBA")
    image.putalpha(Image.new("L", image.size, opacity))
    return image


SIXTEEN = Image.fromarray(np.random.default_rng(3).integers(0, 65536, (53, 67), dtype=np.uint16))
IMAGES: dict[str, tuple[str, Image.Image, dict, str | None]] = {
    "gray": ("x.png", scene(99).convert("L"), {}, None),
    "CMYK": ("x.jpg", scene(99).convert("CMYK"), {}, None),
    "palette": ("x.png", scene(99).quantize(200), {}, None),
    "half the median side": ("x.png", scene(99, 40, 27), {}, None),
    "small": ("x.png", scene(99, 26, 31), {}, "small"),
    "aspect ratio 4": ("x.png", scene(99, 212, 53), {}, None),
    "aspect ratio above 4": ("x.png", scene(99, 53, 213), {}, "elongated"),
    "large": ("x.png", scene(99, 4097, 4096), {"compress_level": 1}, "large"),
    "one color": ("x.png", Image.new("RGB", (67, 53), "teal"), {}, "blank"),
    "rotated": ("x.jpg", scene(99), with_orientation(6), "rotated"),
    "mirrored": ("x.png", scene(99), with_orientation(2), "rotated"),
    "upright": ("x.jpg", scene(99), with_orientation(1), None),
    "orientation 0": ("x.jpg", scene(99), with_orientation(0), None),
    "truncated EXIF": ("x.jpg", scene(99), {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}, "decoder-warnings"),
    "invalid EXIF": ("x.png", scene(99), {"exif": b"Exif\0\0nothing at all"}, None),
    "opaque": ("x.png", with_opacity(255), {}, None),
    "transparent": ("x.png", with_opacity(254), {}, "partly-ignored"),
    "transparent color": ("x.png", scene(99).quantize(200), {"transparency": 7}, "partly-ignored"),
    "animated": ("x.png", scene(99), {"save_all": True, "append_images": [scene(98)]}, "partly-ignored"),
    "pages": ("x.tif", scene(99), {"save_all": True, "append_images": [scene(98)]}, "partly-ignored"),
    "phone photograph with preview": (
        "x.jpg",
        scene(99),
        {"format": "MPO", "save_all": True, "append_images": [scene(98)]},
        None,
    ),
    "sixteen bits": ("x.png", SIXTEEN, {}, "partly-ignored"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_single_images(root, case):
    name, image, options, expected = IMAGES[case]
    save(root / "train" / "ape" / name, image, **options)
    report = check_folder(root)
    assert found(report) == ({expected: [(f"train/ape/{name}",)]} if expected else {})
    assert all(finding.severity == "warning" for finding in report.findings)


@pytest.mark.parametrize(("side", "other_side"), [(23, 29), (37, 211)])
def test_a_small_image_is_reported_only_among_larger_ones(tmp_path, side, other_side):
    save(tmp_path / "ape" / "1.png", scene(0, side, side))
    for number, path in enumerate(("ape/2.png", "bat/1.png", "bat/2.png"), start=1):
        save(tmp_path / path, scene(number, other_side, other_side))
    assert "small" not in found(check_folder(tmp_path))


def test_decoder_warnings_are_reported_and_not_printed(root, capfd, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # PIL warns above it, and raises an error above twice as many
    report = check_folder(root)
    assert found(report) == {"decoder-warnings": [(f"{path}.png",) for path in GOOD]}
    assert "exceeds limit of 3000 pixels" in notes(report)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("side", "reported"), [(32, True), (33, False)])
def test_images_too_small_for_most_models(root, side, reported):
    for number, path in enumerate(GOOD):
        save(root / f"{path}.png", scene(number, side + 1, side))
    report = check_folder(root)
    assert found(report) == ({"small-for-most-models": [(".",)]} if reported else {})
    assert ("224 x 224" in "".join(finding.advice for finding in report.findings)) == reported
