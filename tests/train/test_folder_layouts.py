"""Training and check-data agree about which folders can be trained on, and name the same problem."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localvit.data.images import DataError
from localvit.dataset_check.report import check_folder
from localvit.train.augmentation import open_train_and_val
from localvit.train.config import TrainConfig

NAMES = ("1.png", "2.png")
LAYOUTS: dict[str, tuple[tuple[str, ...], list[str] | str]] = {
    "classes": (("ape", "bat"), ["ape", "bat"]),
    "train and val": (("train/ape", "train/bat", "val/ape", "val/bat"), ["ape", "bat"]),
    "train only": (("train/ape", "train/bat"), ["ape", "bat"]),
    "train and test": (("train/ape", "train/bat", "test/ape"), ["ape", "bat"]),
    "classes called like splits": (("train/test", "train/val"), ["test", "val"]),
    "folders beside splits": (("train/ape", "train/bat", "val/ape", "old/ape"), ["ape", "bat"]),
    "classes, and an archive's folder": (("ape", "bat", "__MACOSX/ape"), ["ape", "bat"]),
    "classes, and a system's folders": (("ape", "bat", "@eaDir", "ape/@eaDir", "lost+found/x"), ["ape", "bat"]),
    "val beside classes": (("ape", "bat", "val/ape"), "val"),
    "test beside classes": (("ape", "bat", "test"), "test/"),
    "validation beside classes": (("ape", "bat", "validation/bat"), "validation/"),
    "val only": (("val/ape", "val/bat"), "val"),
    "test only": (("test/ape", "test/bat"), "test/"),
    "train and validation": (("train/ape", "train/bat", "validation/ape"), "validation"),
    "other names": (("Train/ape", "Train/bat", "Val/ape"), "Train/, Val/"),
    "one level too high": (("data/ape", "data/bat"), "data"),
    "one level too high, from an archive": (("data/train/ape", "data/val/ape", "__MACOSX/data/ape"), "data"),
    "one class": (("train/ape", "val/ape"), "ape"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_training_and_check_data_agree(case, tmp_path):
    folders, expected = LAYOUTS[case]
    generator = np.random.default_rng(0)
    for folder in folders:
        for name in NAMES:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (41, 43, 3), dtype=np.uint8)).save(path)
    report = check_folder(tmp_path)
    config = TrainConfig(data_set="FOLDER", data_path=tmp_path)
    if isinstance(expected, list):
        train_images, val_images = open_train_and_val(config)
        assert train_images.class_names == expected
        assert set(val_images.class_names or []) <= set(expected)
        assert report.count("error") == 0
        return
    with pytest.raises(DataError) as error:
        open_train_and_val(config)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert report.count("error") > 0


@pytest.mark.parametrize("parent", ["", "train"])
def test_one_image_in_each_class_leaves_none_to_evaluate_on(parent, tmp_path):
    for name in ("ape", "bat"):
        (tmp_path / parent / name).mkdir(parents=True)
        Image.new("RGB", (41, 43), "red" if name == "ape" else "blue").save(tmp_path / parent / name / "1.png")
    with pytest.raises(DataError, match="no class with two images"):
        open_train_and_val(TrainConfig(data_set="FOLDER", data_path=tmp_path))
    assert check_folder(tmp_path).count("error") == 1


def test_val_that_is_a_link_to_train_is_refused(tmp_path):
    test_training_and_check_data_agree("train only", tmp_path)
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(DataError, match="used for both training and evaluation"):
        open_train_and_val(TrainConfig(data_set="FOLDER", data_path=tmp_path))
    assert check_folder(tmp_path).count("error") > 0


def test_inaturalist_has_one_folder_for_training_and_evaluation(tmp_path):
    for split, number in (("train", 1), ("val", 2)):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}0.png")
        content = {
            "images": [
                {"id": number, "file_name": f"{number}.png"},
                {"id": 10 * number, "file_name": f"{number}0.png"},
            ],
            "annotations": [{"image_id": number, "category_id": 0}, {"image_id": 10 * number, "category_id": 1}],
            "categories": [{"id": 0, "name": "ape"}, {"id": 1, "name": "bat"}],
        }
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))
    train_images, val_images = open_train_and_val(TrainConfig(data_set="INAT", data_path=tmp_path))
    assert (train_images.name(0), val_images.name(0)) == ("1.png", "2.png")


def test_folders_beside_train_are_named(tmp_path, caplog):
    test_training_and_check_data_agree("folders beside splits", tmp_path)
    assert any("which are not read: old" in record.message for record in caplog.records)


def test_the_output_of_a_run_does_not_become_a_class(tmp_path):
    """runs/train is the default folder, relative to the current one."""
    test_training_and_check_data_agree("classes", tmp_path)
    run = Path(tmp_path, "runs", "train")
    run.mkdir(parents=True)
    (run / "checkpoint.pth").write_bytes(b"")
    Image.new("RGB", (41, 43)).save(run / "curves.png")
    train_images, _ = open_train_and_val(TrainConfig(data_set="FOLDER", data_path=tmp_path))
    assert train_images.class_names == ["ape", "bat"]
    assert check_folder(tmp_path).counts["all"].keys() == {"ape", "bat"}
