"""Images, whatever they are stored in, and what becomes of one that cannot be read."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS


class DataError(ValueError):
    """A data set that cannot be used; the message says where it is, what is wrong with it and what to do."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names the file and the decoder's reason."""


class ImageSequence(ABC):
    """A fixed sequence of images."""

    root: Path | None = None
    """The folder below which `name` finds each image, where images are files of one folder."""

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB. Raises UnreadableImage, or whatever the decoder raises."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call image `index`: its path (below `root`, if there is one), or its place in the data set."""

    @abstractmethod
    def __len__(self) -> int: ...


class Images(ImageSequence):
    """A fixed sequence of labeled images."""

    class_names: list[str] | None
    """Names of the classes that labels count through; None where the data set does not say."""
    labels: list[int]
    """The class of each image."""
    fixed_order: bool = False
    """Whether the data set itself numbers its classes (CIFAR), rather than the order of some folders."""

    def __len__(self) -> int:
        return len(self.labels)


class FileImages(Images):
    """Images in files: paths below a folder, each with its class."""

    def __init__(self, root: Path, samples: list[tuple[str, int]], class_names: list[str]) -> None:
        self.root = root
        self.class_names = class_names
        self.paths = [path for path, _ in samples]
        self.labels = [label for _, label in samples]

    def load(self, index: int) -> Image.Image:
        assert self.root is not None
        return open_image(self.root / self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]


class DatasetImages(Images):
    """Images of a data set that is indexed and numbers its own classes."""

    fixed_order = True

    def __init__(
        self, open_image: Callable[[int], Image.Image], labels: list[int], class_names: list[str] | None, title: str
    ) -> None:
        self.open_image = open_image
        self.labels = labels
        self.class_names = class_names
        self.title = title

    def load(self, index: int) -> Image.Image:
        return to_rgb(self.open_image(index))

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, the first one of an animation, in RGB. Raises whatever the decoder raises."""
    with Image.open(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB with 8 bits a channel; of 16 bits the upper 8 are kept, as PIL does where there is color.

    Raises ValueError for one of 32-bit numbers, whose black and white nothing tells.
    """
    if image.mode.startswith("I;16"):  # PIL would clip these to 255, that is, to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose black and white are not known; save it with 8 or 16 bits")
    return image.convert("RGB")


def scan_folder(root: Path) -> tuple[FileImages, list[str]]:
    """The images of a folder with one folder a class, and remarks on what was left out.

    Classes are the visible sub-folders in the order of their names, as torchvision's ImageFolder counts them; a
    class's images may lie in folders of its own. Hidden folders and files are left out; a class folder without an
    image stays a class; both are remarked on.

    Raises DataError when `root` is no folder, has no class folder, or has no image.
    """
    if not root.is_dir():
        raise DataError(
            f"no folder {root}" if not root.exists() else f"{root} is a file, not a folder of class folders"
        )
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    visible = [name for name in folders if not name.startswith(".")]
    hidden = [name for name in folders if name.startswith(".")]
    if not visible:
        raise DataError(f"{root} has no class folders; put the images into one sub-folder for each class")
    remarks = [f"left out the hidden folder {root / name}" for name in hidden]
    samples = []
    for label, class_name in enumerate(visible):
        paths = images_below(root / class_name)
        if not paths:
            remarks.append(f"the class folder {root / class_name} holds no images")
        samples += [(path.relative_to(root).as_posix(), label) for path in paths]
    if not samples:
        raise DataError(f"{root} has {len(visible)} class folders but no images ({', '.join(IMG_EXTENSIONS)})")
    return FileImages(root, samples, visible), remarks


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and its sub-folders, each folder's sorted, hidden files and folders left out.

    Links are followed, to each folder once. Raises OSError for a folder that cannot be listed.
    """
    found: list[Path] = []
    walked = set()
    for directory, subdirectories, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (where := Path(directory).resolve()) in walked:  # a link to a folder above would lead around in circles
            subdirectories.clear()
            continue
        walked.add(where)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        found += [
            Path(directory, name)
            for name in sorted(files)
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    return found


def _raise(error: OSError) -> None:
    raise error


def load_image(images: ImageSequence, index: int) -> Image.Image:
    """Image `index` in RGB; raises UnreadableImage, naming it, for whatever PIL cannot decode."""
    try:
        return images.load(index)
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage(f"{_where(images, index)}: no such file any more") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImage(f"{_where(images, index)}: cannot be read as an image ({reason})") from error


def _where(images: ImageSequence, index: int) -> str:
    name = images.name(index)
    return str(images.root / name) if images.root else name


class PreparedImages(Dataset):
    """Images ready for a model: item i is (i, tensor (C, H, W)), or (i, the reason) for one that cannot be read."""

    def __init__(self, images: ImageSequence, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        # A reason instead of an exception: an exception from a worker process arrives as a traceback, not a message.
        try:
            return index, self.transform(load_image(self.images, index))
        except UnreadableImage as error:
            return index, str(error)
