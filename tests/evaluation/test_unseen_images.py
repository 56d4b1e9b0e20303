"""A model is evaluated on images that it was not trained on; others are left out, or named."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import localvit
from localvit.data.images import DataError
from localvit.data.split import split_images
from localvit.evaluation.unseen_images import open_unseen_images
from localvit.inference.runner import InferenceOptions, load_model
from localvit.train.augmentation import open_train_and_val
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.loop import fit
from localvit_cli import main

OPTIONS = InferenceOptions(workers=0)


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(count)
    for name in ("ape", "bat", "cow"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (10 + count, 23 + number % 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with `images`, of which a run trained on 24 and held out 6, and the run's folder `run`."""
    folder = tmp_path_factory.mktemp("unseen")
    write_images(folder / "images", 10)
    config = TrainConfig(
        model="localvit_nano_patch4_32",
        model_args={"depth": 1},
        data_set="FOLDER",
        data_path=folder / "images",
        output_dir=folder / "run",
        val_fraction=0.2,
        seed=3,
        epochs=1,
        warmup_epochs=0,
        batch_size=8,
        repeated_aug=False,
        workers=0,
        device="cpu",
    )
    fit(build(config))
    return folder


def held_out(folder: Path) -> set[str]:
    """What the run was evaluated on, by the names of the split itself."""
    config = TrainConfig(data_set="FOLDER", data_path=folder / "images", val_fraction=0.2, seed=3)
    _, images = open_train_and_val(config)
    return {images.name(index) for index in range(len(images))}


def test_images_that_a_run_trained_on_are_left_out(run, capsys):
    result = localvit.evaluate(run / "run" / "best.safetensors", run / "images", options=OPTIONS)
    assert len(result.paths) == 6
    assert set(result.paths) == held_out(run)

    arguments = ["--data-path", str(run / "images"), "--workers", "0", "--device", "cpu"]
    assert main(["eval", str(run / "run" / "best.safetensors"), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == result.line() + "\n"
    assert "on the 6 images that were kept out of training; the other 24, which the model was trained on" in printed.err


def test_they_are_named_when_asked_for(run, capsys):
    arguments = ["--data-path", str(run / "images"), "--workers", "0", "--device", "cpu", "--include-trained"]
    assert main(["eval", str(run / "run" / "best.safetensors"), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "the model was trained on 24 of the 30 images"
    assert "warning: the model was trained on 24 of these 30 images" in printed.err
    result = localvit.evaluate(run / "run" / "best.safetensors", run / "images", options=OPTIONS, include_trained=True)
    assert (len(result.paths), result.num_trained_on) == (30, 24)
    assert "30 images, of which the model was trained on 24" in str(result)


def unseen(run: Path, folder: Path, **more) -> tuple[set[str], int]:
    about = load_model(run / "run" / "last.safetensors").about
    images, num_trained_on = open_unseen_images("FOLDER", folder, about, **more)
    return {images.name(index) for index in range(len(images))}, num_trained_on


def test_a_copied_folder_is_recognized_and_another_one_of_the_same_names_is_not(run, tmp_path, monkeypatch):
    shutil.copytree(run / "images", tmp_path / "copy")
    assert unseen(run, tmp_path / "copy") == (held_out(run), 0)
    write_images(tmp_path / "other", 11)
    assert len(unseen(run, tmp_path / "other")[0]) == 33
    (tmp_path / "link").symlink_to(run / "images")
    monkeypatch.chdir(tmp_path)
    assert unseen(run, Path("link")) == (held_out(run), 0)


def test_a_broken_link_is_an_unreadable_image(run, tmp_path):
    shutil.copytree(run / "images", tmp_path / "copy")
    (tmp_path / "copy" / "ape" / "gone.png").symlink_to("nowhere.png")
    assert unseen(run, tmp_path / "copy") == (held_out(run), 0)
    write_images(tmp_path / "other", 4)
    (tmp_path / "other" / "ape" / "loop.png").symlink_to("loop.png")
    loaded = load_model(run / "run" / "last.safetensors")
    result = localvit.evaluate(loaded, tmp_path / "other", options=OPTIONS, skip_unreadable=True)
    assert (len(result.paths), len(result.skipped)) == (12, 1)


def test_images_that_came_later_change_nothing(run, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(run / "images", tmp_path / "grown")
    for number in range(7):
        shutil.copy(run / "images" / "ape" / "00.png", tmp_path / "grown" / "ape" / f"new{number}.png")
    assert unseen(run, tmp_path / "grown") == (held_out(run), 0)
    assert "the other 31, which the model was trained on or which are new, are left out" in caplog.text
    names, num_trained_on = unseen(run, tmp_path / "grown", include_trained=True)
    assert (len(names), num_trained_on) == (37, 24)


def test_a_validation_folder_is_used_as_it_is_and_the_training_folder_is_not(tmp_path):
    write_images(tmp_path / "images" / "train", 4)
    write_images(tmp_path / "images" / "val", 2)
    config = TrainConfig(
        model="localvit_nano_patch4_32",
        data_set="FOLDER",
        data_path=tmp_path / "images",
        batch_size=4,
        repeated_aug=False,
        workers=0,
    )
    about = build(config).describe()["about"]
    images, _ = open_unseen_images("FOLDER", tmp_path / "images", about)
    assert len(images) == 6
    with pytest.raises(DataError, match="none of the images that were kept out of training"):
        open_unseen_images("FOLDER", tmp_path / "images" / "train", about)
    assert open_unseen_images("FOLDER", tmp_path / "images" / "train", about, include_trained=True)[1] == 12
    assert len(open_unseen_images("FOLDER", tmp_path / "images" / "val", about)[0]) == 6


def test_checkpoints_without_a_record(run, tmp_path):
    """Those with settings only are split again; those with nothing evaluate on everything, as do modules."""
    about = load_model(run / "run" / "last.safetensors").about
    settings = {"config": about["config"]}
    images, _ = open_unseen_images("FOLDER", run / "images", settings)
    assert {images.name(index) for index in range(len(images))} == held_out(run)
    for nothing in ({}, {"config": "none"}, {"held_out": 3, "config": {"data_set": "FOLDER", "data_path": 4}}):
        everything, num_trained_on = open_unseen_images("FOLDER", run / "images", nothing)
        assert (len(everything), num_trained_on) == (30, 0)
        assert isinstance(split_images(everything, 0.2, 3), tuple)
    loaded = replace(load_model(run / "run" / "last.safetensors"), about={})
    assert len(localvit.evaluate(loaded, run / "images", options=OPTIONS).paths) == 30


def test_a_checkpoint_names_its_data_set_but_opens_nothing(run, tmp_path, capsys):
    """A file that somebody else wrote decides neither which folder is read nor what is downloaded."""
    assert main(["eval", str(run / "run" / "best.safetensors")]) == 2
    assert f"give the folder with --data-path; the model was trained on {run / 'images'}" in capsys.readouterr().err
    model = localvit.create_model("localvit_nano_patch4_32", depth=1, num_classes=3)
    path = tmp_path / "downloaded.safetensors"
    localvit.save_checkpoint(model, path, about={"config": {"data_set": "hfds/somebody/data"}})
    assert main(["eval", str(path), "--data-path", str(run / "images")]) == 2
    assert "was trained on hfds/somebody/data" in capsys.readouterr().err
    localvit.save_checkpoint(model, path, about={"config": {"data_set": "DIGITS"}}, class_names=["ape", "bat", "cow"])
    before = sorted(os.walk(run / "images"))
    assert main(["eval", str(path), "--data-path", str(run / "images"), "--device", "cpu", "--workers", "0"]) == 0
    assert sorted(os.walk(run / "images")) == before  # no digits are written into the folder
