"""Images that are decoded once and kept in memory, as bytes, in the size that all of them have before anything random.

Shapes: N images, C = 3 channels, H and W pixels.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from localvit.data.images import DataError, Images, PreparedImages, UnreadableImage
from localvit.data.preprocessing import Preprocessing
from localvit.data.recorded_images import image_keys
from localvit.data.workers import init_worker, iterate_batches
from localvit.utils.memory import available_memory

logger = logging.getLogger(__name__)

_BATCH = 64
_SECONDS_BETWEEN_MESSAGES = 10.0

Resizing = Callable[[Image.Image], Image.Image]
"""What is done to each image before it is kept; not random."""


class CachedImages(Images):
    """Labeled images in memory. `load` returns them resized."""

    def __init__(self, images: Images, pixels_NCHW: Tensor, preprocessing: Preprocessing | None = None) -> None:
        """
        Args:
            images: The images, for their names and classes.
            pixels_NCHW: What was decoded, uint8.
            preprocessing: The preprocessing that they are resized for; None for training.
        """
        self.preprocessing = preprocessing
        self.images = images
        self.pixels_NCHW = pixels_NCHW
        self.root = images.root
        self.class_names = images.class_names
        self.labels = images.labels
        self.fixed_order = images.fixed_order

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels_NCHW[index].permute(1, 2, 0).numpy())

    def name(self, index: int) -> str:
        return self.images.name(index)


class DecodedImages:
    """The pixels of the last run of a process, for the next one if it has the same images, in the same size.

    Of the training and of the validation images, those of the last run are kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Tensor]] = {}
        self.seconds = 0.0
        """Time that decoding has taken."""

    def pixels(self, title: str, images: Images, resizing: Resizing, decode: Callable[[], Tensor]) -> Tensor:
        """What `decode` returns, or what it has returned for these images.

        Args:
            title: What the images are for.
            images: The images. Only files can be recognized, by their folder, names and sizes.
            resizing: What is done to each, recognized by its text.
            decode: Decodes them, to (N, C, H, W).
        """
        key = None
        if images.root is not None:
            keys = image_keys(images, with_sizes=True).numpy().tobytes()
            key = (images.root, hashlib.sha256(keys).digest(), repr(resizing))
            if title in self._kept and self._kept[title][0] == key:
                logger.info(f"cache: the {title}images are decoded already")
                return self._kept[title][1]
        self._kept.pop(title, None)  # before there is memory for both
        started = time.monotonic()
        pixels_NCHW = decode()
        self.seconds += time.monotonic() - started
        if key is not None:
            self._kept[title] = key, pixels_NCHW
        return pixels_NCHW


def cache_images(
    images: Images,
    resizing: Resizing,
    workers: int,
    *,
    copies: int = 1,
    title: str = "",
    decoded: DecodedImages | None = None,
) -> CachedImages:
    """Decode all images and keep them in memory.

    Args:
        images: The images.
        resizing: What is done to each; afterwards they must be of one size.
        workers: Number of worker processes that decode; 0 decodes in this process.
        copies: Number of processes on this machine that do the same at the same time, for the memory that is needed.
        title: What the images are for, for messages.
        decoded: Images that were decoded before, and are not decoded again.

    Raises:
        DataError: The images do not fit into memory, or are not of one size.
        UnreadableImage: An image cannot be decoded.
        RuntimeError: A worker process died.
    """

    def decode() -> Tensor:
        return _decode(images, resizing, workers, copies, title)

    return CachedImages(images, decoded.pixels(title, images, resizing, decode) if decoded else decode())


def _decode(images: Images, resizing: Resizing, workers: int, copies: int, title: str) -> Tensor:
    """The images as bytes (N, C, H, W). Raises as `cache_images`."""
    started = time.monotonic()
    sized = PreparedImages(images, _Bytes(resizing))
    first = _checked(sized[0][1])
    height, width = first.shape[1:]
    what = f"{len(images):,} {title}images of {height} x {width} pixels".replace("  ", " ")
    _check_memory(len(images) * first.numel(), copies, what)
    logger.info(f"cache: decoding {what}, {len(images) * first.numel() / 1e6:,.0f} MB")
    pixels_NCHW = torch.empty(len(images), *first.shape, dtype=torch.uint8)
    last_message = started
    for begin, batch in _decoded(sized, workers):
        if time.monotonic() - last_message > _SECONDS_BETWEEN_MESSAGES:
            last_message = time.monotonic()
            logger.info(f"cache: decoded {begin:,} of {len(images):,} images")
        if isinstance(batch, Tensor) and batch.shape[1:] == first.shape:
            pixels_NCHW[begin : begin + len(batch)] = batch
            continue
        for index, item in enumerate(batch, begin):
            pixels = _checked(item)
            if pixels.shape != first.shape:
                raise DataError(_differing_sizes(images, index, pixels, first))
            pixels_NCHW[index] = pixels
    logger.info(f"cache: decoded in {time.monotonic() - started:.1f} s")
    return pixels_NCHW


def cache_for_evaluation(
    images: Images,
    preprocessing: Preprocessing,
    workers: int,
    *,
    copies: int = 1,
    decoded: DecodedImages | None = None,
) -> CachedImages:
    """Decode all images, resize and crop them for evaluation, and keep them in memory. See `cache_images`."""
    resizing = preprocessing.resizing()
    cached = cache_images(images, resizing, workers, copies=copies, title="validation ", decoded=decoded)
    return CachedImages(images, cached.pixels_NCHW, preprocessing)


class _Bytes:
    """A transform to bytes (C, H, W)."""

    def __init__(self, resizing: Resizing) -> None:
        self.resizing = resizing

    def __call__(self, image: Image.Image) -> Tensor:
        return pil_to_tensor(self.resizing(image))


def _decoded(sized: PreparedImages, workers: int) -> Iterator[tuple[int, Tensor | list[Tensor | str]]]:
    """The images in batches, in order, each with the index of its first."""
    loader: DataLoader = DataLoader(
        sized,
        batch_size=_BATCH,
        num_workers=min(workers, -(-len(sized) // _BATCH)),
        collate_fn=_collate,
        worker_init_fn=init_worker,
    )
    for number, batch in enumerate(iterate_batches(loader)):
        yield number * _BATCH, batch


def _collate(items: list[tuple[int, Tensor | str]]) -> Tensor | list[Tensor | str]:
    """The batch as one tensor if possible: a worker process sends each tensor through a file of its own."""
    values = [value for _, value in items]
    tensors = [value for value in values if isinstance(value, Tensor)]
    is_uniform = len(tensors) == len(values) and len({value.shape for value in tensors}) == 1
    return torch.stack(tensors) if is_uniform else values


def _checked(pixels: Tensor | str) -> Tensor:
    if isinstance(pixels, str):
        raise UnreadableImage(f"{pixels}; --skip-unreadable leaves such images out")
    return pixels


def _check_memory(size: int, copies: int, what: str) -> None:
    available = available_memory()
    if available is not None and size * copies > available:
        processes = f" in each of {copies} processes" if copies > 1 else ""
        raise DataError(
            f"--cache needs {size / 1e9:,.1f} GB of memory{processes} for {what}, and {available / 1e9:,.1f} GB are "
            "available: leave out --cache, or use fewer or smaller images"
        )


def _differing_sizes(images: Images, index: int, pixels: Tensor, first: Tensor) -> str:
    sizes = [
        f"{name} has {each.shape[1]} x {each.shape[2]}"
        for name, each in ((images.name(0), first), (images.name(index), pixels))
    ]
    return (
        f"--cache needs images of one size, and, resized for the model, {sizes[0]} pixels and {sizes[1]}: leave out "
        "--cache, or crop the images to one aspect ratio"
    )
