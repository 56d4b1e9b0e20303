"""Data sets by name: what `--data-set` accepts, and what each expects at `--data-path`."""

import difflib
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image
from timm.data import create_dataset

from localvit.data.digits import write_digits
from localvit.data.folders import scan_folder
from localvit.data.hub_stream import HubStream
from localvit.data.image_stream import ImageStream, check_count, read_into_memory
from localvit.data.images import DataError, DatasetImages, Images
from localvit.data.inaturalist import inaturalist
from localvit.data.tar_shards import TarShards, is_plain_tar
from localvit.data.tar_stream import TarStream
from localvit.data.tfds_stream import TfdsStream

logger = logging.getLogger(__name__)

NAMES = ("IMNET", "IMNET-A", "IMNET-R", "CIFAR", "CIFAR10", "INAT", "INAT19", "FOLDER", "DIGITS")
"""The names besides those of timm's dataset factory (hfds/..., wds/..., tfds/..., torch/...)."""
_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow tensorflow-datasets"}
_STREAMS = ("wds", "hfids", "tfds")
_SPLITS = {"train": ["train"], "val": ["validation", "val", "valid", "test"]}
"""How the splits of data sets are called elsewhere. Many have no other images to evaluate on than test."""


def default_digits_folder() -> Path:
    """The default folder of the embedded digits, in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "localvit" / "digits"


def open_images(data_set: str, data_path: Path | None, *, split: str = "val", inat_category: str = "name") -> Images:
    """Open one split of a data set. Warnings about what was skipped are logged.

    Args:
        data_set: One of `NAMES`, in any case, or a name of timm's dataset factory.
        data_path: Folder of the data set. Only DIGITS has a default.
        split: "train" or "val". FOLDER, IMNET-A and IMNET-R use `data_path` itself if it has no such subfolder.
        inat_category: Level of the taxonomy that provides the labels of INAT and INAT19.

    Raises:
        DataError: The name is unknown, or the folder does not contain what the name promises.
    """
    name = data_set.upper()
    if name == "DIGITS":
        folder = write_digits(data_path or default_digits_folder())
        return _open_folder(folder / split, is_split=True)
    if "/" not in data_set and name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise DataError(
            f"--data-set {data_set} is not known{hint}; choose one of {', '.join(NAMES)}, or a timm name such as "
            "hfds/NAME"
        )
    if data_path is None:
        raise DataError(f"--data-set {data_set} needs --data-path, the folder of the images")
    if "/" not in data_set and not data_path.exists():
        raise DataError(f"--data-path {data_path}: no such folder")
    if name == "IMNET":
        if not (data_path / split).is_dir():
            raise DataError(f"{data_path} has no {split}/ folder; use --data-set FOLDER for a folder of class folders")
        return _open_folder(data_path / split, is_split=True)
    if name in ("IMNET-A", "IMNET-R", "FOLDER"):
        is_split = (data_path / split).is_dir()
        return _open_folder(data_path / split if is_split else data_path, is_split=is_split)
    if name in ("CIFAR", "CIFAR10"):
        return _open_cifar(name, data_path, split)
    if name in ("INAT", "INAT19"):
        return inaturalist(data_path, split, 2018 if name == "INAT" else 2019, inat_category)
    opened = _open_stream(data_set, data_path, split)
    if isinstance(opened, ImageStream):
        return read_into_memory(opened)
    return opened or _open_timm(data_set, data_path, split)


def open_stream(data_set: str, data_path: Path | None, *, split: str = "val") -> ImageStream | None:
    """Open a data set that can be read in order only; None for any other, which `open_images` opens.

    Args:
        data_set, data_path, split: As in `open_images`, which would read the stream into memory.

    Raises:
        DataError: The data set cannot be opened.
    """
    opened = _open_stream(data_set, data_path, split) if data_path is not None else None
    return opened if isinstance(opened, ImageStream) else None


def _open_folder(folder: Path, *, is_split: bool) -> Images:
    images, warnings = scan_folder(folder, is_split=is_split)
    for warning in warnings:
        logger.warning(warning)
    return images


def _open_cifar(name: str, data_path: Path, split: str) -> Images:
    kind = torchvision.datasets.CIFAR100 if name == "CIFAR" else torchvision.datasets.CIFAR10
    try:
        dataset = kind(str(data_path), train=split == "train")
    except RuntimeError as error:
        raise DataError(
            f"{data_path} has no complete {kind.base_folder}/ (the contents of {kind.filename}); download and unpack it"
        ) from error
    return _from_torchvision(dataset, name)


def _from_torchvision(dataset: Any, title: str) -> Images:
    return DatasetImages(partial(_dataset_image, dataset), list(dataset.targets), list(dataset.classes), title)


def _open_timm(data_set: str, data_path: Path, split: str) -> Images:
    if data_set.lower().startswith("torch/") and not data_path.exists():
        raise DataError(f"--data-path {data_path}: no such folder")
    with _errors_of_library(data_set):
        dataset = create_dataset(data_set, root=str(data_path), split="validation" if split == "val" else split)
    if hasattr(dataset, "targets") and hasattr(dataset, "classes"):
        return _from_torchvision(dataset, data_set)
    reader = getattr(dataset, "reader", None)
    if reader is None:
        raise DataError(f"--data-set {data_set}: {type(dataset).__name__} does not provide labels for its images")
    # timm's data set would silently replace an unreadable image by the next one; its reader does not.
    labels = [int(label) for label in _reader_labels(reader)]
    class_to_idx = getattr(reader, "class_to_idx", None) or {}
    names = sorted(class_to_idx, key=class_to_idx.__getitem__) or None
    return DatasetImages(partial(_reader_image, reader), labels, names, data_set)


def _reader_labels(reader: Any) -> list[int]:
    if hasattr(reader, "samples"):
        return [label for _, label in reader.samples]
    return reader.dataset[reader.label_key]


def _open_stream(data_set: str, data_path: Path, split: str) -> ImageStream | TarShards | None:
    """A data set that its library reads in order. webdataset's tar files on this machine can be indexed instead.

    None if the data set is of another kind.
    """
    kind, slash, name = data_set.partition("/")
    if not slash or kind.lower() not in _STREAMS:
        return None
    root = _address(data_path)
    with _errors_of_library(data_set):
        if kind.lower() == "wds":
            return _open_tar_files(data_set, root, split)
        stream = (HubStream if kind.lower() == "hfids" else TfdsStream)(name, root, _SPLITS[split], title=data_set)
    if stream.split not in (split, "validation"):
        logger.info(f"--data-set {data_set}: reading its split {stream.split}")
    return stream


def _open_tar_files(title: str, root: str, split: str) -> TarShards | TarStream:
    """The images in the tar files that timm's description of a webdataset (`_info.json`) names."""
    reader: Any = create_dataset("wds/", root=root, split="validation" if split == "val" else split).reader
    info, extensions = reader.split_info, [*reader.input_key.split(";"), "jpeg"]
    paths = [Path(root, name) for name in info.filenames]  # an address is not the path of a file, either
    if info.alt_label or not all(map(is_plain_tar, paths)):
        return TarStream(
            [posixpath.join(root, name) for name in info.filenames],
            extensions,
            title=title,
            num_images=info.num_samples or None,
            json_label=info.alt_label,
        )
    images = TarShards(paths, extensions, title=title)
    check_count(title, info.num_samples or None, len(images))
    return images


def _address(data_path: Path) -> str:
    """The path as a text. An address that was made a path has lost a slash."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", str(data_path))


@contextmanager
def _errors_of_library(data_set: str) -> Iterator[None]:
    """Raise DataError for whatever the library of a data set raises."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(data_set.split("/", 1)[0].lower())
        advice = f"pip install {package}" if package else "install the missing package"
        raise DataError(f"--data-set {data_set}: {error}; {advice}") from error
    except Exception as error:  # each data set library raises its own types
        raise DataError(f"--data-set {data_set}: cannot be opened: {error or type(error).__name__}") from error


# Module functions rather than lambdas, because worker processes receive them pickled.
def _dataset_image(dataset: Any, index: int) -> Image.Image:
    return dataset[index][0]


def _reader_image(reader: Any, index: int) -> Image.Image:
    return Image.open(reader[index][0])
