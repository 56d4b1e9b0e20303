"""Unusual image files: each is decoded like PIL does it, or gives a one-line error."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from localvit.data.folders import PathImages, scan_folder
from localvit.data.images import (
    DataError,
    FileImages,
    PreparedImages,
    UnreadableImage,
    load_image,
)
from localvit.data.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (29, 37, 3), dtype=np.uint8)


def png(image: Image.Image, **options) -> bytes:
    packed = io.BytesIO()
    image.save(packed, format=options.pop("format", "PNG"), **options)
    return packed.getvalue()


WORKS = {
    "rgb.png": png(Image.fromarray(NOISE)),
    "gray.png": png(Image.fromarray(NOISE[..., 0])),
    "alpha.png": png(Image.fromarray(NOISE).convert("RGBA")),
    "palette.png": png(Image.fromarray(NOISE).quantize(17)),
    "transparent_palette.png": png(Image.fromarray(NOISE).quantize(17), transparency=3),
    "bilevel.png": png(Image.fromarray(NOISE).convert("1")),
    "cmyk.jpg": png(Image.fromarray(NOISE).convert("CMYK"), format="JPEG"),
    "animated.gif": png(
        Image.fromarray(NOISE), format="GIF", save_all=True, append_images=[Image.fromarray(255 - NOISE)]
    ),
    "animated.webp": png(
        Image.fromarray(NOISE), format="WEBP", save_all=True, append_images=[Image.fromarray(255 - NOISE)]
    ),
    "one_pixel.png": png(Image.new("RGB", (1, 1), "red")),
    "one_row.png": png(Image.fromarray(NOISE[:1])),
    "png_called_jpg.jpg": png(Image.fromarray(NOISE)),
    "wide.png": png(Image.new("RGB", (9000, 3), "blue")),
}


@pytest.mark.parametrize("name", WORKS)
def test_images_are_decoded_like_pil_does_it(name, tmp_path):
    (tmp_path / name).write_bytes(WORKS[name])
    images = FileImages(tmp_path, [(name, 0)], ["a"])
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(images, 0)), expected)
    index, tensor = PreparedImages(images, Preprocessing(input_size=(23, 19)).transform())[0]
    assert index == 0
    assert tensor.shape == (3, 23, 19)
    assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", ["sixteen_bit.png", "sixteen_bit.tiff"])
def test_16_bit_images_keep_the_upper_8_bits(name, tmp_path):
    """PIL's own conversion would clip them to white."""
    values = RNG.integers(0, 65536, (29, 37), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    loaded = np.asarray(load_image(FileImages(tmp_path, [(name, 0)], ["a"]), 0))
    np.testing.assert_array_equal(loaded, np.repeat((values // 256)[..., None], 3, axis=2))


WHOLE = png(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format="JPEG")
BROKEN = {
    "empty.jpg": (b"", "cannot identify|empty"),
    "truncated.jpg": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "text.jpg": (b"<html>not found</html>", "cannot identify"),
    "header_only.png": (WORKS["rgb.png"][:20], "cannot be read"),
    "corrupt.png": (WORKS["rgb.png"][:60] + bytes(40) + WORKS["rgb.png"][100:], "cannot be read"),
    "floats.tiff": (png(Image.fromarray(RNG.random((29, 37), dtype=np.float32)), format="TIFF"), "32-bit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_images_give_a_one_line_error(name, tmp_path):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    images = FileImages(tmp_path, [(name, 0)], ["a"])
    with pytest.raises(UnreadableImage, match=reason) as error:
        load_image(images, 0)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert PreparedImages(images, lambda image: image)[0] == (0, str(error.value))


def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch):
    """PIL's limit, lowered so that the test need not write 180 million pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    (tmp_path / "huge.png").write_bytes(png(Image.new("RGB", (50, 50))))
    with pytest.raises(UnreadableImage, match=r"huge\.png.*decompression bomb"):
        load_image(FileImages(tmp_path, [("huge.png", 0)], ["a"]), 0)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UnreadableImage, match=r"gone\.png: no such file"):
        load_image(FileImages(tmp_path, [("gone.png", 0)], ["a"]), 0)


class DamagedImages(FileImages):
    """Images whose decoder raises the error of this name."""

    def load(self, index):
        raise {
            "RuntimeError": RuntimeError("Failed to decode frame 0: Truncated data"),
            "MemoryError": MemoryError(),
            "struct.error": struct.error("unpack requires a buffer of 4 bytes"),
            "RecursionError": RecursionError("maximum recursion depth exceeded"),
            "KeyError": KeyError("a tile"),
            "ZeroDivisionError": ZeroDivisionError("division\nby zero"),
        }[self.paths[index]]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_error_of_a_decoder_is_an_unreadable_image(workers, tmp_path):
    """Decoders raise arbitrary types for damaged files; each becomes a line that names the file, in any process."""
    names = ["RuntimeError", "MemoryError", "struct.error", "RecursionError", "KeyError", "ZeroDivisionError"]
    images = PreparedImages(DamagedImages(tmp_path, [(name, 0) for name in names], ["a"]), lambda image: image)
    loader = DataLoader(images, batch_size=None, num_workers=workers)
    for (_, reason), name in zip(loader, names, strict=True):
        assert reason.startswith(f"{tmp_path / name}: cannot be read as an image ("), reason
        assert name.removeprefix("struct.") in reason
        assert "\n" not in reason


def test_a_damaged_avif_file_is_an_unreadable_image(tmp_path):
    """Its decoder raises RuntimeError; PIL recognizes files by content, not by name."""
    if not features.check("avif"):
        pytest.skip("this PIL has no AVIF decoder")
    content = bytearray(png(Image.fromarray(NOISE), format="AVIF"))
    start = content.index(b"mdat") + 4
    content[start : start + 40] = bytes(40)
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(RuntimeError):
        Image.open(tmp_path / "x.jpg").load()
    with pytest.raises(UnreadableImage, match=r"x\.jpg: cannot be read as an image \(RuntimeError"):
        load_image(FileImages(tmp_path, [("x.jpg", 0)], ["a"]), 0)


def test_an_error_of_the_transform_names_the_image(tmp_path):
    def transform(image):
        raise MemoryError

    (tmp_path / "rgb.png").write_bytes(WORKS["rgb.png"])
    _, reason = PreparedImages(FileImages(tmp_path, [("rgb.png", 0)], ["a"]), transform)[0]
    assert reason == f"{tmp_path / 'rgb.png'}: cannot be prepared for the model, 37 x 29 pixels (MemoryError)"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "a named pipe, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
    ],
    ids=["named pipe", "device", "folder"],
)
@pytest.mark.timeout(20)
def test_what_is_not_a_file_is_not_opened(make, reason, tmp_path):
    """PIL would wait for a writer to the pipe, and read the device without end."""
    make(tmp_path / "x.png")
    for images in (FileImages(tmp_path, [("x.png", 0)], ["a"]), FileImages(tmp_path, [("link.png", 0)], ["a"])):
        (tmp_path / "link.png").unlink(missing_ok=True)
        (tmp_path / "link.png").symlink_to("x.png")
        with pytest.raises(UnreadableImage, match=rf"(x|link)\.png: cannot be read as an image \({reason}\)"):
            load_image(images, 0)


def test_postscript_is_not_run(tmp_path):
    """PIL would give it to Ghostscript, as a program."""
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n{} loop\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(header)
    assert Image.open(tmp_path / "x.png").format == "EPS"
    with pytest.raises(UnreadableImage, match=r"x\.png.*PostScript"):
        load_image(FileImages(tmp_path, [("x.png", 0)], ["a"]), 0)


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(WORKS["rgb.png"])


def test_scan_folder_equals_torchvision(tmp_path):
    """The same classes, files and order as ImageFolder, which the published program reads with."""
    from torchvision.datasets import ImageFolder

    write(tmp_path, "b/2.png", "b/10.png", "b/sub/x.JPEG", "a/é ü.png", "10/a.png", "9/a.png", "B/upper.PNG")
    images, warnings = scan_folder(tmp_path)
    theirs = ImageFolder(str(tmp_path))
    assert images.class_names == theirs.classes
    assert [
        (str(tmp_path / path), label) for path, label in zip(images.paths, images.labels, strict=True)
    ] == theirs.samples
    assert warnings == []


def test_hidden_files_are_skipped_and_empty_classes_kept(tmp_path):
    write(tmp_path, "ape/1.png", "ape/.hidden.png", "ape/.cache/2.png", ".git/3.png")
    (tmp_path / "bat").mkdir()
    (tmp_path / "ape" / "notes.txt").write_text("not an image")
    images, warnings = scan_folder(tmp_path)
    assert images.paths == ["ape/1.png"]
    assert images.class_names == ["ape", "bat"]
    assert len(warnings) == 2
    assert any(".git" in warning for warning in warnings)
    assert any("bat" in warning and "no images" in warning for warning in warnings)


def test_symbolic_links_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere", "1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "ape").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "around").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "itself").symlink_to(tmp_path / "root" / "itself")
    assert scan_folder(tmp_path / "root")[0].paths == ["ape/1.png"]


def test_a_link_back_to_the_data_set_does_not_add_the_images_of_other_classes(tmp_path):
    write(tmp_path / "data" / "train", "ape/1.png", "bat/2.png")
    (tmp_path / "data" / "train" / "ape" / "up").symlink_to("..")
    (tmp_path / "data" / "train" / "bat" / "top").symlink_to(tmp_path / "data")
    assert scan_folder(tmp_path / "data" / "train")[0].paths == ["ape/1.png", "bat/2.png"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "no folder"),
        (lambda root: root.write_text(""), "is a file"),
        (lambda root: root.mkdir(), "no class folders"),
        (lambda root: write(root, "1.png"), "no class folders"),
        (lambda root: write(root, ".hidden/1.png"), "no class folders"),
        (lambda root: (root / "ape").mkdir(parents=True), "no images"),
        (lambda root: write(root, "ape/1.png") or (root / "ape" / "x.pt").touch(), "ape is not read .* weights"),
    ],
)
def test_errors_for_folders_without_images(build, message, tmp_path):
    build(tmp_path / "data")
    with pytest.raises(DataError, match=message) as error:
        scan_folder(tmp_path / "data")
    assert str(tmp_path / "data") in str(error.value)


def test_images_of_every_extension_that_pil_reads_are_found(tmp_path):
    """The names of a browser, a phone and a scanner; what cannot be read is counted and named."""
    write(tmp_path, *(f"ape/{name}" for name in ("a.jfif", "b.GIF", "c.jp2", "d.jpe", "e.png")))
    write(tmp_path, "bat/f.heic", "bat/g", "bat/h.png")
    (tmp_path / "bat" / "notes.txt").write_text("about bats")
    images, warnings = scan_folder(tmp_path)
    assert images.paths == ["ape/a.jfif", "ape/b.GIF", "ape/c.jp2", "ape/d.jpe", "ape/e.png", "bat/h.png"]
    assert len(images) == len([load_image(images, index) for index in range(len(images))])
    (warning,) = warnings
    assert warning.startswith("2 images are not read because of the extension (.heic: 1, none: 1), such as")
    assert str(tmp_path / "bat" / "f.heic") in warning


def test_a_folder_with_unread_images_only_says_so(tmp_path):
    write(tmp_path, "ape/a.heic", "bat/b.svg", "bat/c.heic")
    with pytest.raises(DataError, match=r"3 images are not read because of the extension \(\.heic: 2, \.svg: 1\)"):
        scan_folder(tmp_path)


def test_paths_name_the_images_that_are_left_out(tmp_path, caplog):
    write(tmp_path, "a.png", "b.heic", "deep/c.svg", "deep/d.gif")
    (tmp_path / "list.txt").write_text("a.png")
    everywhere = ["a.png", "deep/d.gif"]
    for paths in ([tmp_path], [tmp_path / "**"], [tmp_path / "*", tmp_path]):
        caplog.clear()
        images = PathImages(paths)
        assert sorted({str(Path(path).relative_to(tmp_path)) for path in images.paths}) == everywhere
        (record,) = caplog.records
        assert "2 images are not read because of the extension (.heic: 1, .svg: 1)" in record.message
    assert PathImages([tmp_path / "b.heic"]).paths == [str(tmp_path / "b.heic")]  # named, so included
    with pytest.raises(DataError, match=r"no image matches.*1 image is not read.*b\.heic"):
        PathImages([str(tmp_path / "*.heic")])


def test_folders_that_are_not_classes_are_skipped_with_a_warning(tmp_path):
    """What an archive of macOS, training, and tools for annotation put beside the class folders."""
    write(tmp_path, "ape/1.png", "bat/2.png", "__MACOSX/ape/3.png", "runs/train/curves.png")
    (tmp_path / "runs" / "train" / "last.safetensors").write_bytes(b"")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.xml").write_text("<box/>")
    (tmp_path / "test").mkdir()
    (tmp_path / "cat").mkdir()
    write(tmp_path, "3.png")
    images, warnings = scan_folder(tmp_path)
    assert images.class_names == ["ape", "bat", "cat"]
    assert images.paths == ["ape/1.png", "bat/2.png"]
    for name in ("__MACOSX", "runs", "labels", "test"):
        assert sum(f"{tmp_path / name} is not read as a class" in warning for warning in warnings) == 1
    assert f"the class folder {tmp_path / 'cat'} contains no images" in warnings
    assert any("images directly in" in warning and "1, such as 3.png" in warning for warning in warnings)
    assert len(warnings) == 6


def test_folders_that_systems_create_are_not_read(tmp_path):
    write(
        tmp_path, "ape/1.png", "ape/@eaDir/1.png/thumbnail.png", "bat/2.png", "@eaDir/bat/2.png", "$RECYCLE.BIN/3.png"
    )
    (tmp_path / "lost+found").mkdir()
    images, warnings = scan_folder(tmp_path)
    assert images.paths == ["ape/1.png", "bat/2.png"]
    assert images.class_names == ["ape", "bat"]
    for name in ("@eaDir", "$RECYCLE.BIN", "lost+found"):
        assert sum(f"{tmp_path / name} is not read as a class: it " in warning for warning in warnings) == 1
    assert PathImages([tmp_path]).paths == [str(tmp_path / path) for path in images.paths]
    assert len(PathImages([tmp_path / "@eaDir"])) == 1  # named, so included


@pytest.mark.parametrize("name", ["val", "test", "validation", "valid", "train", "Training", "testing"])
def test_splits_beside_class_folders_are_refused(name, tmp_path):
    write(tmp_path, "ape/1.png", "bat/2.png", f"{name}/ape/3.png")
    with pytest.raises(DataError, match=rf"contains {name}/ beside the class folders ape, bat: move"):
        scan_folder(tmp_path)
    write(tmp_path / "all", f"train/{name}/1.png", "train/bat/2.png")
    assert scan_folder(tmp_path / "all" / "train", is_split=True)[0].class_names == sorted([name, "bat"])


def test_splits_instead_of_class_folders_are_refused(tmp_path):
    write(tmp_path, "training/ape/1.png", "validation/ape/1.png")
    with pytest.raises(DataError, match=r"training/, validation/ instead of class folders: name .* train .* val"):
        scan_folder(tmp_path)


def test_class_folders_without_images_of_their_own_are_reported(tmp_path):
    """As where the folder is one level too high."""
    write(tmp_path, "data/ape/1.png", "data/bat/2.png")
    _, (warning,) = scan_folder(tmp_path)
    assert "such as data/ape" in warning
    write(tmp_path, "more/3.png")
    assert scan_folder(tmp_path)[1] == []
