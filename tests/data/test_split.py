"""Splitting a folder without val/: by class, depending on the seed only."""

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localvit.data.folders import scan_folder
from localvit.data.images import (
    DataError,
    DatasetImages,
    FileImages,
    UnreadableImage,
    load_image,
)
from localvit.data.split import split_images

COUNTS = {"ape": 23, "bat": 2, "cat": 101, "dog": 7}


def folder_images(counts, root="root", order_seed=None):
    """Image names without files, `counts` of each class, in the folder's order or shuffled."""
    names = sorted(counts)
    samples = [(f"{name}/{number}.png", names.index(name)) for name in names for number in range(counts[name])]
    if order_seed is not None:
        random.Random(order_seed).shuffle(samples)
    return FileImages(Path(root), samples, names)


def names_of(images):
    return {images.name(index) for index in range(len(images))}


def of_class(images, name):
    return {each for each in names_of(images) if each.startswith(f"{name}/")}


@pytest.mark.parametrize("val_fraction", [0.15, 0.5, 0.01, 0.99])
def test_each_class_is_split_in_proportion(val_fraction):
    images = folder_images(COUNTS)
    train, val = split_images(images, val_fraction, seed=3)
    assert names_of(train) | names_of(val) == names_of(images)
    assert not names_of(train) & names_of(val)
    assert len(train) + len(val) == len(images)
    for name, count in COUNTS.items():
        share = len(of_class(val, name))
        assert 1 <= share <= count - 1
        # Rounded to the nearest image, unless a set would have none.
        target = val_fraction * count
        assert abs(share - target) <= 0.5 or (target < 1 and share == 1) or (target > count - 1 and share == count - 1)


def test_the_split_depends_on_the_seed_only():
    reference = [names_of(side) for side in split_images(folder_images(COUNTS), 0.15, seed=3)]
    for order_seed in (None, 1, 2):
        moved = folder_images(COUNTS, root="elsewhere", order_seed=order_seed)
        assert [names_of(side) for side in split_images(moved, 0.15, seed=3)] == reference
    assert [names_of(side) for side in split_images(folder_images(COUNTS), 0.15, seed=4)] != reference
    # A literal, so that no version of this or another package can change the split of an earlier run.
    assert of_class(split_images(folder_images(COUNTS), 0.15, seed=3)[1], "dog") == {"dog/1.png"}


def test_other_classes_do_not_change_the_split_of_a_class():
    _, val = split_images(folder_images(COUNTS), 0.15, seed=3)
    more = folder_images(COUNTS | {"aardvark": 40, "bee": 12})
    _, val_of_more = split_images(more, 0.15, seed=3)
    for name in COUNTS:
        assert of_class(val_of_more, name) == of_class(val, name)


def test_classes_are_split_independently():
    """Files with the same name in two classes are not always in the same set."""
    counts = {"ape": 200, "bat": 200}
    _, val = split_images(folder_images(counts), 0.5, seed=0)
    apes, bats = ({name.split("/")[1] for name in of_class(val, each)} for each in counts)
    # If 100 of 200 files are chosen at random twice, 50 +- 3.5 are chosen both times; five standard deviations.
    assert abs(len(apes & bats) - 50) < 18


def test_each_image_has_the_same_probability():
    images = folder_images({"ape": 20})
    seeds = 2000
    times = np.zeros(20)
    for seed in range(seeds):
        _, val = split_images(images, 0.15, seed)
        for index in range(len(val)):
            times[int(val.name(index).split("/")[1].removesuffix(".png"))] += 1
    # Binomial: 300 +- 16; five standard deviations, for 20 images.
    assert np.abs(times - 0.15 * seeds).max() < 5 * math.sqrt(seeds * 0.15 * 0.85)


def test_the_only_image_of_a_class_goes_to_train_with_a_warning(caplog):
    train, val = split_images(folder_images({"ape": 1, "bat": 5, "cat": 1}), 0.15, 0)
    assert {"ape/0.png", "cat/0.png"} < names_of(train)
    assert set(val.labels) == {1}
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("localvit.data.split", "WARNING")
    assert record.getMessage().startswith("2 classes have a single image")
    assert record.getMessage().endswith("ape, cat")
    split_images(folder_images(COUNTS), 0.15, 0)
    assert len(caplog.records) == 1


def test_both_sets_load_the_same_images_as_the_whole(tmp_path):
    for name, count in {"ape": 4, "bat": 3, "empty": 0}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            shade = (number * 10, 0, 255 if name == "bat" else 0)
            Image.new("RGB", (3, 5), shade).save(tmp_path / name / f"{number}.png")
    whole, _ = scan_folder(tmp_path)
    for side in split_images(whole, 0.3, seed=1):
        assert side.root == tmp_path
        assert side.class_names == ["ape", "bat", "empty"]
        assert not side.fixed_order
        for index, label in enumerate(side.labels):
            class_name, file = side.name(index).split("/")
            assert class_name == side.class_names[label]
            shade = (int(file.removesuffix(".png")) * 10, 0, 255 if class_name == "bat" else 0)
            assert load_image(side, index).getpixel((0, 0)) == shade
        (tmp_path / side.name(0)).write_bytes(b"")
        with pytest.raises(UnreadableImage, match=str(tmp_path / side.name(0))):
            load_image(side, 0)


def test_a_data_set_without_class_names_or_files():
    images = DatasetImages(lambda index: Image.new("L", (2, 3), index), [0, 1, 0, 1, 1, 0], None, "some")
    train, val = split_images(images, 0.3, seed=0)
    assert sorted(val.labels) == [0, 1]
    assert val.class_names is None
    assert val.fixed_order
    index = int(val.name(0).removeprefix("some[").removesuffix("]"))
    assert val.load(0).getpixel((0, 0)) == (index,) * 3
    assert len(train) == 4


def test_a_file_name_that_is_not_valid_utf8():
    name = os.fsdecode(b"ape/\xff.png")
    train, val = split_images(FileImages(Path("root"), [(name, 0), ("ape/0.png", 0)], ["ape"]), 0.5, 0)
    assert names_of(train) | names_of(val) == {name, "ape/0.png"}


@pytest.mark.parametrize(
    ("counts", "val_fraction", "error", "message"),
    [
        ({"ape": 3}, 0.0, ValueError, "val_fraction=0.0 must be in"),
        ({"ape": 3}, 1.0, ValueError, "val_fraction=1.0 must be in"),
        ({"ape": 3}, math.nan, ValueError, "val_fraction=nan must be in"),
        ({"ape": 1, "bat": 1}, 0.15, DataError, "root has no class with two images"),
    ],
)
def test_bad_input(counts, val_fraction, error, message):
    with pytest.raises(error, match=message):
        split_images(folder_images(counts), val_fraction, seed=0)
