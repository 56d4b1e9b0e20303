"""The data sets by name: what `--data-set` accepts, and what each expects to find at `--data-path`."""

import io
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from localvit.data.digits import write_digits
from localvit.data.images import DataError, DatasetImages, Images, scan_folder
from localvit.data.inaturalist import inaturalist

logger = logging.getLogger(__name__)

NAMES = ("IMNET", "IMNET-A", "IMNET-R", "CIFAR", "CIFAR10", "INAT", "INAT19", "FOLDER", "DIGITS")
"""Besides these, any name that timm's factory knows (hfds/..., wds/..., tfds/..., torch/...)."""


def default_digits_folder() -> Path:
    """Where the embedded digits are written unless a data path says otherwise: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "localvit" / "digits"


def open_images(
    data_set: str,
    data_path: Path | None,
    *,
    split: str = "val",
    inat_category: str = "name",
) -> Images:
    """The images of `split` ("train" or "val") of a data set.

    Args:
        data_set: one of `NAMES`, or a name of timm's dataset factory.
        data_path: its folder; only DIGITS has a default.
        inat_category: level of the taxonomy that INAT and INAT19 are labeled at.

    Raises:
        DataError: for a name that is not known, or a folder that does not hold what the name says.
    """
    name = data_set.upper()
    if name == "DIGITS":
        folder = write_digits(data_path or default_digits_folder())
        return _scan(folder / split)
    if data_path is None:
        raise DataError(f"--data-set {data_set} needs --data-path, the folder of the images")
    if "/" not in data_set and not data_path.exists():
        raise DataError(f"--data-path {data_path}: no such folder")
    if name == "IMNET":
        if not (data_path / split).is_dir():
            raise DataError(f"{data_path} has no {split}/ folder; --data-set FOLDER takes the class folders directly")
        return _scan(data_path / split)
    if name in ("IMNET-A", "IMNET-R", "FOLDER"):
        return _scan(data_path / split if (data_path / split).is_dir() else data_path)
    if name in ("CIFAR", "CIFAR10"):
        return _cifar(name, data_path, split)
    if name in ("INAT", "INAT19"):
        return inaturalist(data_path, split, 2018 if name == "INAT" else 2019, inat_category)
    if "/" in data_set:
        return _of_timm(data_set, data_path, split)
    raise DataError(f"--data-set {data_set} is not known; choose {', '.join(NAMES)}, or a timm name like hfds/NAME")


def _scan(folder: Path) -> Images:
    images, warnings = scan_folder(folder)
    for warning in warnings:
        logger.warning(warning)
    return images


def _cifar(name: str, data_path: Path, split: str) -> Images:
    kind = torchvision.datasets.CIFAR100 if name == "CIFAR" else torchvision.datasets.CIFAR10
    try:
        dataset = kind(str(data_path), train=split == "train")
    except RuntimeError as error:
        raise DataError(
            f"{data_path} has no whole {kind.base_folder}/ (the unpacked archive {kind.filename})"
        ) from error
    return _of_torchvision(dataset, name)


def _of_torchvision(dataset: Any, title: str) -> Images:
    return DatasetImages(partial(_image_of_item, dataset), list(dataset.targets), list(dataset.classes), title)


def _of_timm(data_set: str, data_path: Path, split: str) -> Images:
    kind = data_set.split("/", 1)[0].lower()
    if kind == "torch" and not data_path.exists():
        raise DataError(f"--data-path {data_path}: no such folder")
    try:
        dataset = create_dataset(data_set, root=str(data_path), split="validation" if split == "val" else split)
    except ImportError as error:
        extra = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}.get(kind)
        advice = f"pip install {extra}" if extra else "install what it names"
        raise DataError(f"--data-set {data_set}: {error}; {advice}") from error
    except Exception as error:  # whatever the data set's own library raises is about the data set
        raise DataError(f"--data-set {data_set}: cannot be opened: {error or type(error).__name__}") from error
    if isinstance(dataset, IterableDataset):
        return _stream_to_memory(dataset, data_set)
    if hasattr(dataset, "targets") and hasattr(dataset, "classes"):
        return _of_torchvision(dataset, data_set)
    reader = getattr(dataset, "reader", None)
    if reader is None:
        raise DataError(f"--data-set {data_set}: {type(dataset).__name__} does not say the classes of its images")
    # The reader and not the data set: timm's data set puts the next image in the place of one it cannot read.
    labels = [int(label) for label in _reader_labels(reader)]
    class_to_idx = getattr(reader, "class_to_idx", None) or {}
    names = sorted(class_to_idx, key=class_to_idx.__getitem__) or None
    return DatasetImages(partial(_image_of_reader, reader), labels, names, data_set)


def _reader_labels(reader: Any) -> list[int]:
    if hasattr(reader, "samples"):
        return [label for _, label in reader.samples]
    return reader.dataset[reader.label_key]


def _stream_to_memory(dataset: IterableDataset, title: str) -> Images:
    """A streamed data set as a fixed sequence, which can be dealt out exactly: each image kept as a lossless file."""
    files, labels = [], []
    for image, label in dataset:
        packed = io.BytesIO()
        image.convert("RGB").save(packed, format="PNG", compress_level=1)
        files.append(packed.getvalue())
        labels.append(int(label))
    if not files:
        raise DataError(f"--data-set {title}: the stream holds no images")
    return DatasetImages(partial(_image_of_bytes, files), labels, None, title)


# Functions of the module and not lambdas, since worker processes receive them pickled.
def _image_of_item(dataset: Any, index: int) -> Image.Image:
    return dataset[index][0]


def _image_of_reader(reader: Any, index: int) -> Image.Image:
    return Image.open(reader[index][0])


def _image_of_bytes(files: list[bytes], index: int) -> Image.Image:
    return Image.open(io.BytesIO(files[index]))
