"""The data sets by name, each with a small copy in the layout of the real one."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from localvit.data.classes import imagenet_synsets, match_classes
from localvit.data.datasets import open_images
from localvit.data.digits import write_digits
from localvit.data.images import DataError, DatasetImages, FileImages

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        IMAGE.save(path)


def test_imnet_reads_the_val_folder(tmp_path):
    write(tmp_path, "val/n01440764/a.JPEG", "train/n01440764/b.JPEG")
    assert open_images("IMNET", tmp_path).paths == ["n01440764/a.JPEG"]
    assert open_images("imnet", tmp_path, split="train").paths == ["n01440764/b.JPEG"]


def test_folder_reads_val_or_the_folder_itself(tmp_path):
    write(tmp_path / "split", "val/ape/a.png", "train/ape/b.png")
    write(tmp_path / "plain", "ape/c.png")
    assert open_images("FOLDER", tmp_path / "split").paths == ["ape/a.png"]
    assert open_images("FOLDER", tmp_path / "plain").paths == ["ape/c.png"]


def test_skipped_folders_are_logged(tmp_path, caplog):
    write(tmp_path, "ape/a.png", ".hidden/b.png")
    (tmp_path / "bat").mkdir()
    open_images("FOLDER", tmp_path)
    assert [(record.name, record.levelname) for record in caplog.records] == [("localvit.data.datasets", "WARNING")] * 2
    assert str(tmp_path / ".hidden") in caplog.text
    assert str(tmp_path / "bat") in caplog.text


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 and -100 with seven images each, in the format of the archives."""
    from torchvision.datasets import CIFAR10, CIFAR100

    pixels = np.random.default_rng(1).integers(0, 256, (7, 3072), dtype=np.uint8)
    for kind, labels, label_key, names_key in (
        (CIFAR10, [3, 1, 4, 1, 5, 9, 2], "labels", "label_names"),
        (CIFAR100, [31, 41, 59, 26, 53, 58, 97], "fine_labels", "fine_label_names"),
    ):
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        count = 10 if kind is CIFAR10 else 100

        def dump(name, content, folder=folder):
            (folder / name).write_bytes(pickle.dumps(content))
            return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

        batch = {"data": pixels, label_key: labels}
        monkeypatch.setattr(kind, "test_list", [dump("test", batch)])
        monkeypatch.setattr(kind, "train_list", [dump("train", batch)])
        name, digest = dump("meta", {names_key: [f"class{index}" for index in range(count)]})
        monkeypatch.setattr(kind, "meta", {"filename": name, "key": names_key, "md5": digest})
    return tmp_path, pixels


@pytest.mark.parametrize(
    ("name", "labels", "count"), [("CIFAR10", [3, 1, 4, 1, 5, 9, 2], 10), ("CIFAR", [31, 41, 59, 26, 53, 58, 97], 100)]
)
def test_cifar(cifar, name, labels, count):
    root, pixels = cifar
    images = open_images(name, root)
    assert images.labels == labels
    assert images.class_names == [f"class{index}" for index in range(count)]
    np.testing.assert_array_equal(np.asarray(images.load(5)), pixels[5].reshape(3, 32, 32).transpose(1, 2, 0))
    assert images.name(5) == f"{name}[5]"


@pytest.mark.parametrize("supercategories", [True, False])
def test_inat(tmp_path, supercategories):
    """Classes are numbered by their first training annotation, at the requested level of the taxonomy."""
    categories = [
        {"id": 0, "name": "Pica pica", "kingdom": "Animalia", "order": "Passeriformes"},
        {"id": 1, "name": "Quercus robur", "kingdom": "Plantae", "order": "Fagales"},
        {"id": 2, "name": "Corvus corax", "kingdom": "Animalia", "order": "Passeriformes"},
    ]

    def split(name, members):
        images = [
            {"id": image, "file_name": f"train_val2018/Taxon/{category}/{image}.jpg"} for image, category in members
        ]
        annotations = [{"image_id": image, "category_id": category} for image, category in members]
        (tmp_path / f"{name}2018.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        for image, category in members:
            middle = "Taxon/" if supercategories else ""
            write(tmp_path, f"train_val2018/{middle}{category}/{image}.jpg")

    (tmp_path / "categories.json").write_text(json.dumps(categories))
    split("train", [(10, 2), (11, 1), (12, 0)])
    split("val", [(20, 0), (21, 1), (22, 2)])
    by_name = open_images("INAT", tmp_path)
    assert by_name.class_names == ["Corvus corax", "Quercus robur", "Pica pica"]
    assert by_name.labels == [2, 1, 0]
    assert by_name.load(0).size == (32, 32)
    by_kingdom = open_images("INAT", tmp_path, inat_category="kingdom")
    assert by_kingdom.class_names == ["Animalia", "Plantae"]
    assert by_kingdom.labels == [0, 1, 0]


def test_digits_are_written_once_and_split_by_class(tmp_path):
    from sklearn.datasets import load_digits

    root = write_digits(tmp_path / "digits")
    train, val = (open_images("DIGITS", root, split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert not {path.split("/")[1] for path in train.paths} & {path.split("/")[1] for path in val.paths}
    assert all(33 <= val.labels.count(digit) <= 38 for digit in range(10))  # a fifth of 174 to 183 of each
    digits = load_digits()
    for images in (train, val):
        for index in range(0, len(images), 97):
            number = int(images.paths[index].split("/")[1].removesuffix(".png"))
            gray = np.asarray(images.load(index))[::4, ::4, 0]
            assert images.labels[index] == digits.target[number]
            np.testing.assert_array_equal(gray, np.round(digits.images[number] * 255 / 16))
    stamp = (root / "val").stat().st_mtime_ns
    assert write_digits(root) == root
    assert (root / "val").stat().st_mtime_ns == stamp
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]


def test_a_timm_data_set(cifar):
    root, pixels = cifar
    images = open_images("torch/cifar10", root)
    assert images.labels == [3, 1, 4, 1, 5, 9, 2]
    np.testing.assert_array_equal(np.asarray(images.load(2)), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_a_streamed_data_set_can_be_indexed(tmp_path):
    """Five images of distinct widths in a webdataset shard."""
    pytest.importorskip("webdataset", reason="webdataset is an extra that is not installed")
    with tarfile.open(tmp_path / "validation-0000.tar", "w") as shard:
        for number in range(5):
            packed = io.BytesIO()
            Image.new("RGB", (8 + number, 8)).save(packed, "JPEG")
            for ending, content in (("jpg", packed.getvalue()), ("cls", str(number % 3).encode())):
                entry = tarfile.TarInfo(f"{number:03d}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    split = {"name": "validation", "num_samples": 5, "filenames": ["validation-0000.tar"], "shard_lengths": [5]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    images = open_images("wds/", tmp_path)
    assert images.labels == [0, 1, 2, 0, 1]
    assert [images.load(index).width for index in (4, 0, 2)] == [12, 8, 10]


def test_a_hugging_face_data_set(tmp_path, monkeypatch):
    """A local folder, which the `datasets` library reads like one on the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets", reason="datasets is an extra that is not installed")
    write(tmp_path / "set", "train/ape/a.png", "validation/ape/b.png", "validation/bat/c.png", "validation/bat/d.png")
    images = open_images(f"hfds/{tmp_path / 'set'}", tmp_path / "cache")
    assert images.labels == [0, 1, 1]
    assert images.class_names == ["ape", "bat"]
    np.testing.assert_array_equal(np.asarray(images.load(2)), np.asarray(IMAGE))


@pytest.mark.parametrize(
    ("data_set", "path", "message"),
    [
        ("IMNET", "nowhere", "no such folder"),
        ("IMNET", ".", "no val/ folder"),
        ("IMNET", None, "needs --data-path"),
        ("CIFAR10", ".", "cifar-10-batches-py"),
        ("CIFAR", ".", "cifar-100-python"),
        ("INAT", ".", "train2018.json"),
        ("INAT19", ".", "train2019.json"),
        ("MNIST", ".", "not known"),
        ("torch/nothing", ".", "cannot be opened"),
        ("wds/nothing", ".", "wds/nothing"),
        ("hfds/nothing", ".", "hfds/nothing"),
        ("FOLDER", ".", "no class folders"),
    ],
)
def test_errors_for_unusable_data_sets(data_set, path, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_images(data_set, tmp_path / path if path else None)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{", r"train2018\.json is not a JSON file"),
        ("{}", r"not those of iNaturalist 2018, or incomplete \(KeyError: 'annotations'\)"),
        ("[]", "not those of iNaturalist 2018"),
        (
            '{"images": [], "annotations": [{"image_id": 9, "category_id": 5}], "categories": [{"id": 5, "name": ""}]}',
            "9",
        ),
    ],
)
def test_errors_for_files_that_are_not_those_of_inaturalist(train, message, tmp_path):
    (tmp_path / "train2018.json").write_text(train)
    with pytest.raises(DataError, match=message) as error:
        open_images("INAT", tmp_path, split="train")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["ape", "notes.txt"])
def test_digits_are_not_written_into_a_folder_that_is_used(name, tmp_path):
    write(tmp_path, "data/ape/a.png")
    (tmp_path / "data" / "notes.txt").touch()
    with pytest.raises(DataError, match="contains something else than the digits"):
        open_images("DIGITS", tmp_path / "data" / name)
    (tmp_path / "empty").mkdir()
    assert len(open_images("DIGITS", tmp_path / "empty")) == 360


def test_bad_inat_category(tmp_path):
    with pytest.raises(DataError, match="--inat-category color"):
        open_images("INAT", tmp_path, inat_category="color")


def names(*class_names, fixed=False, empty=()):
    labels = [label for label, name in enumerate(class_names) if name not in empty]
    if fixed:
        return DatasetImages(lambda index: IMAGE, labels, list(class_names), "set")
    return FileImages(None, [("x.png", label) for label in labels], list(class_names))


def test_classes_are_matched_by_name():
    assert match_classes(names("cow", "ape"), ["ape", "bat", "cow"], 3) == [2, 0]
    shark, cock = "n01484850", "n01514668"
    assert match_classes(names(shark, cock), imagenet_synsets(), 1000) == [2, 7]
    assert match_classes(names("x", "y"), None, 2) == [0, 1]
    assert match_classes(names("tench", "cock", fixed=True), ["a", "b"], 2) == [0, 1]
    assert match_classes(names("ape", "bat", "new", empty=("bat", "new")), ["bat", "ape"], 2) == [1, 0, -1]


@pytest.mark.parametrize(
    ("images", "model_names", "num_classes", "message"),
    [
        (names("ape", "bta"), ["ape", "bat"], 2, r"1 of the data set's 2 classes.*'bta'.*did you mean 'bat'"),
        (names("cat"), imagenet_synsets(), 1000, "not ImageNet-1k synsets"),
        (names("a", "b", "c"), None, 2, "3 classes, the model 2"),
        (names("a", "b", "c", fixed=True), ["x", "y"], 2, "'a', 'b', 'c'"),
    ],
)
def test_errors_for_classes_that_do_not_match(images, model_names, num_classes, message):
    with pytest.raises(DataError, match=message):
        match_classes(images, model_names, num_classes)
