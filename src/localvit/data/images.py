"""Indexed images from files and data sets, and how an image is decoded."""

import io
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class DataError(ValueError):
    """A data set that cannot be used. The message names the data set, the problem and what to do."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded or transformed. The message names the file and the reason."""


class ImageSequence(ABC):
    """An indexed sequence of images."""

    root: Path | None = None
    """The folder that `name` is relative to, or None if the images are not files in one folder."""

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Decode one image to RGB. Raises UnreadableImage or the decoder's exceptions."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The path of an image (relative to `root`, if there is one), or its position in the data set."""

    @abstractmethod
    def __len__(self) -> int: ...


class Images(ImageSequence):
    """An indexed sequence of labeled images."""

    class_names: list[str] | None
    """Name of each class, in label order; None if the data set has no class names."""
    labels: list[int]
    """The class index of each image."""
    fixed_order: bool = False
    """True if the data set itself defines the class order (CIFAR); False if it is the sorted folder names."""

    def __len__(self) -> int:
        return len(self.labels)


class FileImages(Images):
    """Labeled image files below one folder."""

    def __init__(self, root: Path, samples: list[tuple[str, int]], class_names: list[str]) -> None:
        """
        Args:
            root: The folder.
            samples: Path relative to `root` and class index of each image.
            class_names: Name of each class.
        """
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
    """Labeled images of an indexed data set that defines its own class order."""

    fixed_order = True

    def __init__(
        self, open_image: Callable[[int], Image.Image], labels: list[int], class_names: list[str] | None, title: str
    ) -> None:
        """
        Args:
            open_image: Returns the image at an index, in any mode. Must be picklable for worker processes.
            labels: The class index of each image.
            class_names: Name of each class, or None.
            title: Name of the data set, for messages.
        """
        self.open_image = open_image
        self.labels = labels
        self.class_names = class_names
        self.title = title

    def load(self, index: int) -> Image.Image:
        return to_rgb(self.open_image(index))

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


def open_image(path: str | Path) -> Image.Image:
    """Decode an image file to RGB; of an animation, its first frame. Raises the decoder's exceptions."""
    with open_file(path) as image:
        return to_rgb(image)


def open_file(path: str | Path) -> Image.Image:
    """Open an image file to read its header; its pixels are decoded when they are used.

    Raises the decoder's exceptions, and ValueError for what is not a regular file, which PIL could wait for without
    end, and for PostScript, which PIL has another program run.
    """
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("a named pipe, not a file" if stat.S_ISFIFO(mode) else "not a regular file")
    return _without_postscript(Image.open(path))


def decode_bytes(content: bytes) -> Image.Image:
    """Decode the bytes of an image file to RGB. Raises as `open_image` does."""
    with _without_postscript(Image.open(io.BytesIO(content))) as image:
        return to_rgb(image)


def _without_postscript(image: Image.Image) -> Image.Image:
    if image.format == "EPS":
        image.close()
        raise ValueError("PostScript, which is a program; convert it to pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB. 16-bit grayscale keeps its upper 8 bits, as PIL does for 16-bit color.

    Raises ValueError for 32-bit pixels, because their black and white levels are unknown.
    """
    if image.mode.startswith("I;16"):  # PIL would clip these to 255, that is, to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose black and white levels are unknown; save it with 8 or 16 bits")
    return image.convert("RGB")


def load_image(images: ImageSequence, index: int) -> Image.Image:
    """Decode one image to RGB. Raises UnreadableImage, with the image's name, if that fails for any reason."""
    return decode(lambda: images.load(index), _location(images, index))


def decode(load: Callable[[], Image.Image], location: str) -> Image.Image:
    """The image that `load` returns. Raises UnreadableImage, with the location, if that fails for any reason."""
    try:
        return load()
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage(f"{location}: no such file") from error
    except Exception as error:  # decoders raise any type for a damaged file: RuntimeError, struct.error, MemoryError
        raise UnreadableImage(f"{location}: cannot be read as an image ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """The first line of an error's message, with the type of an error that is not for a person."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if not lines:
        return kind
    return lines[0] if isinstance(error, OSError | ValueError | SyntaxError) else f"{kind}: {lines[0]}"


def _location(images: ImageSequence, index: int) -> str:
    name = images.name(index)
    return str(images.root / name) if images.root else name


def prepare(load: Callable[[], Image.Image], location: str, transform: Callable[[Image.Image], Tensor]) -> Tensor | str:
    """The image that `load` returns, transformed for a model (C, H, W), or the reason why it cannot be used.

    The reason instead of an exception, because one raised in a worker process arrives as a traceback.
    """
    try:
        image = decode(load, location)
    except UnreadableImage as error:
        return str(error)
    try:
        return transform(image)
    except Exception as error:  # such as MemoryError, or a size that an operation cannot have
        size = f"{image.width} x {image.height} pixels"
        return f"{location}: cannot be prepared for the model, {size} ({reason_of(error)})"


class PreparedImages(Dataset):
    """Images transformed for a model. Item i is (i, tensor (C, H, W)), or (i, reason) if the image cannot be used."""

    def __init__(self, images: ImageSequence, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        return index, prepare(lambda: self.images.load(index), _location(self.images, index), self.transform)
