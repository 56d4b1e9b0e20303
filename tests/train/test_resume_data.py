"""A run keeps its images and classes when its folder changes."""

import shutil

import pytest
import torch
from PIL import Image
from tiny import tiny_config
from torch import nn

from localvit.data.images import DataError
from localvit.data.recorded_images import image_keys
from localvit.train.builder import build
from localvit.train.loop import fit
from localvit.train.run_folder import STATE, read_state

SETTINGS = {"data_set": "FOLDER", "model_args": {"depth": 1}, "ema_decay": None, "epochs": 1, "val_fraction": 0.3}


@pytest.fixture
def folder(tmp_path):
    """Two classes of 17 and 23 images."""
    for name, count in (("ape", 17), ("bee", 23)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (32, 32), (number * 10, 0, 0)).save(tmp_path / "images" / name / f"{number:03}.png")
    return tmp_path / "images"


@pytest.fixture
def run(folder, tmp_path):
    """A finished run on the folder, and the names of its images."""
    training = build(tiny_config(folder, tmp_path / "run", **SETTINGS))
    fit(training)
    return names(training)


def names(training):
    return tuple(
        {images.name(index) for index in range(len(images))}
        for images in (training.batches.images.images, training.val_images)
    )


def resumed(folder, tmp_path, **changes):
    return build(tiny_config(folder, tmp_path / "run", **SETTINGS | {"epochs": 2} | changes), resume="auto")


def test_no_image_crosses_between_training_and_validation(folder, run, tmp_path, caplog):
    for number in range(100, 140):
        shutil.copy(folder / "ape" / "000.png", folder / "ape" / f"{number}.png")
    removed = [*sorted(run[0])[:2], *sorted(run[1])[:3]]
    for name in removed:
        (folder / name).unlink()
    training = resumed(folder, tmp_path)
    assert names(training) == (run[0] - set(removed), run[1] - set(removed))
    (line,) = [each for each in caplog.messages if "has changed since" in each]
    assert "2 of its training images are missing, 3 of its validation images are missing" in line
    assert "40 images were added, which this run does not use" in line
    fit(training)


def test_images_added_to_a_folder_with_val_are_left_out(tiny_digits, tmp_path, caplog):
    """The run then ends as if nothing had been added."""
    data = shutil.copytree(tiny_digits, tmp_path / "data")
    settings = {"model_args": {"depth": 1}, "ema_decay": None}
    fit(build(tiny_config(data, tmp_path / "whole", **settings)))
    fit(build(tiny_config(data, tmp_path / "run", **settings | {"epochs": 1})))
    for split in ("train", "val"):
        file = min((data / split / "1").iterdir())
        shutil.copy(file, file.with_name(f"added-{file.name}"))
    again = tiny_config(data, tmp_path / "run", **settings, warmup_epochs=1)
    whole = build(tiny_config(data, tmp_path / "whole", **settings), resume="auto")
    training = build(again, resume="auto")
    assert "2 images were added" in "".join(caplog.messages)
    assert names(training) == names(whole)
    assert [len(images) for images in names(training)] == [39, 9]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "ape").rename(folder / "cow"), "no 'ape'; new 'cow'"),
        (lambda folder: shutil.rmtree(folder / "bee"), "no 'bee'"),
        (lambda folder: shutil.copytree(folder / "ape", folder / "cow"), "new 'cow'"),
    ],
)
def test_other_classes_are_refused(folder, run, tmp_path, change, words):
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    change(folder)
    with pytest.raises(DataError, match=f"the classes have changed since the run started.*{words}"):
        resumed(folder, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_state_from_before_images_were_recorded_checks_the_classes(folder, run, tmp_path):
    entries = read_state(tmp_path / "run" / STATE)
    del entries["localvit"]["images"]
    torch.save(entries, tmp_path / "run" / STATE)
    assert names(resumed(folder, tmp_path)) == run
    (folder / "ape").rename(folder / "cow")
    with pytest.raises(DataError, match="the classes have changed"):
        resumed(folder, tmp_path)


def test_a_folder_without_the_images_of_the_run_is_refused(folder, run, tmp_path):
    for path in folder.glob("*/*.png"):
        path.rename(path.with_name(f"new-{path.name}"))
    with pytest.raises(DataError, match="has none of the 28 training images of the run"):
        resumed(folder, tmp_path)


def test_a_folder_that_moved_is_the_same(folder, run, tmp_path, caplog):
    caplog.clear()
    moved = folder.rename(tmp_path / "moved")
    assert names(resumed(moved, tmp_path)) == run
    assert not any("has changed since" in line for line in caplog.messages)


def test_keys_tell_images_and_classes_apart(folder):
    class Named(nn.Module):
        root = None
        class_names = ("ape", "bee")
        labels = (0, 1, 0)

        def name(self, index):
            return ("x.png", "x.png", "y\udcff.png")[index]

    keys = image_keys(Named())
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == 3
