"""Tar shards of a webdataset: indexed and not drained, each image once at any number of processes."""

import tracemalloc

import numpy as np
import pytest
import torch

import localvit
from localvit.data.datasets import open_images
from localvit.data.images import DataError
from localvit.data.tar_shards import TarShards
from localvit_cli import main
from processes import run_localvit, start_group, status_of
from tar_sets import png_bytes, write_set, write_shard

wds = pytest.importorskip("webdataset", reason="webdataset is an extra that is not installed")


def test_the_images_are_those_that_webdataset_reads(tmp_path):
    folder = write_set(tmp_path / "set")
    images = open_images("wds/", folder)
    assert isinstance(images, TarShards)
    urls = [str(folder / f"validation-{index:04d}.tar") for index in range(3)]
    stream = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls", "__key__")
    expected = list(stream)
    assert [(label, images.name(index).partition("/")[2]) for index, label in enumerate(images.labels)] == [
        (label, key) for _, label, key in expected
    ]
    for index, (pixels, _, _) in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(images.load(index)), pixels)


def test_the_images_are_not_read_before_they_are_used(tmp_path):
    folder = write_set(tmp_path / "set", counts=(40,), side=300)
    assert (folder / "validation-0000.tar").stat().st_size > 10_000_000
    tracemalloc.start()
    images = open_images("wds/", folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 40
    assert peak < 2_000_000


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=3, depth=1)
    torch.nn.init.normal_(model.head.weight)
    return localvit.save_checkpoint(model, tmp_path / "nano.safetensors")


def test_every_number_of_processes_counts_each_image_once(tmp_path, checkpoint, capsys):
    """Against the same images as files. timm's reader would give the second shard's image to one worker only."""
    folder = write_set(tmp_path / "set")
    for number in range(13):
        place = tmp_path / "files" / str(number % 3)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03d}.png").write_bytes(png_bytes(number))
    flags = ["--device", "cpu", "--batch-size", "2"]
    assert main(["eval", str(checkpoint), "--data-set", "FOLDER", "--data-path", str(tmp_path / "files"), *flags]) == 0
    expected = capsys.readouterr().out
    arguments = ["eval", checkpoint, "--data-set", "wds/", "--data-path", folder, *flags]
    for workers in ("0", "2"):
        assert main([*map(str, arguments), "--workers", workers]) == 0
        assert capsys.readouterr().out == expected
    out, err = tmp_path / "out", tmp_path / "err"
    group = start_group(3, run_localvit, *arguments, "--workers", "0", out=out, err=err)
    assert [status_of(each) for each in group] == [0, 0, 0], err.read_text()
    assert out.read_text() == expected


def damaged(kind, folder):
    """Damages a set of two shards; returns what the message says."""
    shard = folder / "validation-0001.tar"
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:700])
        return "0001.tar (is truncated|cannot be read as a tar file)"
    if kind == "no label":
        write_shard(shard, [("7.png", png_bytes(7))])
        return r"sample 7 in .*0001\.tar has no label"
    if kind == "no image":
        write_shard(shard, [("7.cls", b"1")])
        return r"sample 7 in .*0001\.tar has no image"
    if kind == "two images":
        write_shard(shard, [("7.png", png_bytes(7)), ("7.jpg", png_bytes(7)), ("7.cls", b"1")])
        return "two images of the sample 7"
    if kind == "no number":
        write_shard(shard, [("7.png", png_bytes(7)), ("7.cls", b"ape")])
        return r"0001\.tar has a label that is not a number"
    write_shard(shard, [("7.png", png_bytes(7)), ("7.cls", b"1")])
    return "says 4 images, and its shards have 3"


@pytest.mark.parametrize("kind", ["truncated", "no label", "no image", "two images", "no number", "one is missing"])
def test_what_a_reader_of_streams_would_leave_out_is_an_error(kind, tmp_path):
    folder = write_set(tmp_path / "set", counts=(2, 2))
    message = damaged(kind, folder)
    with pytest.raises(DataError, match=message):
        open_images("wds/", folder)


def test_an_unreadable_image_is_named(tmp_path, checkpoint, capsys):
    folder = write_set(tmp_path / "set", counts=(2, 1))
    write_shard(folder / "validation-0001.tar", [("7.png", b"no image"), ("7.cls", b"1")])
    arguments = ["eval", str(checkpoint), "--data-set", "wds/", "--data-path", str(folder), "--workers", "0"]
    assert main([*arguments, "--device", "cpu"]) == 1
    assert "validation-0001.tar/7: cannot be read as an image" in capsys.readouterr().err
    assert main([*arguments, "--device", "cpu", "--skip-unreadable"]) == 0
