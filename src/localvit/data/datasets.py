"""Data sets by name: what `--data-set` accepts, and what each expects at `--data-path`."""

import difflib
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
from localvit.data.folders import scan_folder
from localvit.data.images import DataError, DatasetImages, Images, to_rgb
from localvit.data.inaturalist import inaturalist
from localvit.data.tar_shards import TarShards, is_plain_tar
from localvit.utils.distributed import world_size

logger = logging.getLogger(__name__)

NAMES = ("IMNET", "IMNET-A", "IMNET-R", "CIFAR", "CIFAR10", "INAT", "INAT19", "FOLDER", "DIGITS")
"""The names besides those of timm's dataset factory (hfds/..., wds/..., tfds/..., torch/...)."""
_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}


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
    return _open_timm(data_set, data_path, split)


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
    kind = data_set.split("/", 1)[0].lower()
    if kind == "torch" and not data_path.exists():
        raise DataError(f"--data-path {data_path}: no such folder")
    try:
        dataset = create_dataset(data_set, root=str(data_path), split="validation" if split == "val" else split)
    except ImportError as error:
        package = _PACKAGES.get(kind)
        advice = f"pip install {package}" if package else "install the missing package"
        raise DataError(f"--data-set {data_set}: {error}; {advice}") from error
    except Exception as error:  # each data set library raises its own types
        raise DataError(f"--data-set {data_set}: cannot be opened: {error or type(error).__name__}") from error
    if isinstance(dataset, IterableDataset):
        return _shards_of(dataset, data_set) or _stream_to_memory(dataset, data_set)
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


def _shards_of(dataset: IterableDataset, title: str) -> Images | None:
    """The images in the tar files of a webdataset on this machine; None for any other stream.

    Raises DataError if the files do not have as many images as the data set says.
    """
    reader: Any = getattr(dataset, "reader", None)
    info = getattr(reader, "split_info", None)
    if type(reader).__name__ != "ReaderWds" or info is None or info.alt_label:
        return None
    paths = [Path(reader.root, name) for name in info.filenames]  # an address is not the path of a file, either
    if not all(map(is_plain_tar, paths)):
        return None
    images = TarShards(paths, [*reader.input_key.split(";"), "jpeg"], title=title)
    if info.num_samples and info.num_samples != len(images):
        raise DataError(
            f"--data-set {title}: its description says {info.num_samples:,} images, and its shards have "
            f"{len(images):,}; copy them again, or correct the description"
        )
    return images


def _stream_to_memory(dataset: IterableDataset, title: str) -> Images:
    """Read a streamed data set into memory, as lossless PNG files, so that it can be indexed."""
    if world_size() > 1:  # timm would give each process some of the images
        raise DataError(
            f"--data-set {title} is a stream, which several processes cannot share exactly: use one process, hfds/ "
            "instead of hfids/, or uncompressed tar files on this machine for wds/"
        )
    files, labels = [], []
    for image, label in dataset:
        packed = io.BytesIO()
        to_rgb(image).save(packed, format="PNG", compress_level=1)
        files.append(packed.getvalue())
        labels.append(int(label))
    if not files:
        raise DataError(f"--data-set {title}: the stream contains no images")
    return DatasetImages(partial(_packed_image, files), labels, None, title)


# Module functions rather than lambdas, because worker processes receive them pickled.
def _dataset_image(dataset: Any, index: int) -> Image.Image:
    return dataset[index][0]


def _reader_image(reader: Any, index: int) -> Image.Image:
    return Image.open(reader[index][0])


def _packed_image(files: list[bytes], index: int) -> Image.Image:
    return Image.open(io.BytesIO(files[index]))
