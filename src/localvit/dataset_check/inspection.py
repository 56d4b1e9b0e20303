"""The inspection of each image of a folder, in parallel: whether it can be read, and what is known about it.

Shapes: N images.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from torch.utils.data import DataLoader, Dataset

from localvit.data.images import FileImages, UnreadableImage, load_image, open_file, to_rgb
from localvit.data.workers import init_worker, iterate_batches
from localvit.dataset_check.near_duplicates import THUMBNAIL_SIDE, perceptual_hash

_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What is known about a readable image."""

    size: tuple[int, int]
    """Width and height in pixels, as decoded."""
    rotated: bool
    """Whether the file asks viewers to rotate or mirror the image (EXIF orientation), which training does not do."""
    ignored: str
    """Contents of the file that training ignores, or an empty string."""
    decoder_warning: str
    """Warnings of the decoder, or an empty string."""
    thumbnail_digest: bytes
    """Identical for images with identical pixels, and for some others."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The inspection of all images."""

    facts: list[ImageFacts | str]
    """For each image, the facts, or the reason it is unreadable."""
    hashes: NDArray[np.uint64]
    """`perceptual_hash` of each image, (N, 4); zero for unreadable ones."""
    contrasts: NDArray[np.float64]
    """Standard deviation of each thumbnail's gray levels (0 to 255), (N,); 0 for unreadable images."""


def inspect(images: FileImages, workers: int, advance: Callable[[int], None] = lambda done: None) -> Inspection:
    """Decode each image once and collect its facts.

    Args:
        images: The images.
        workers: Number of worker processes; 0 decodes in this process.
        advance: Called with the number of images done since the last call.

    Raises:
        RuntimeError: A worker process died.
    """
    batches = list(_batches(_InspectedImages(images), range(len(images)), _collate, workers, advance))
    return Inspection(
        facts=[facts for batch, _, _ in batches for facts in batch],
        hashes=np.concatenate([hashes for _, hashes, _ in batches]),
        contrasts=np.concatenate([contrasts for _, _, contrasts in batches]),
    )


def pixel_digests(images: FileImages, indices: Sequence[int], workers: int) -> list[bytes]:
    """Compute a digest of the size and the decoded pixels of the images at some indices.

    Raises:
        UnreadableImage: An image can no longer be read.
        RuntimeError: A worker process died.
    """
    digests = []
    for batch in _batches(_PixelDigests(images), indices, list, workers, lambda done: None):
        for digest in batch:
            if isinstance(digest, str):
                raise UnreadableImage(digest)
            digests.append(digest)
    return digests


class _FilesWithMetadata(FileImages):
    """Image files that keep some metadata of the last decoded file."""

    rotated = False
    ignored = ""

    def load(self, index: int) -> Image.Image:
        assert self.root is not None
        with open_file(self.root / self.paths[index]) as opened:
            image = to_rgb(opened)
            self.rotated = _orientation(opened) in range(2, 9)
            self.ignored = _ignored_contents(opened)
        return image


def _orientation(opened: Image.Image) -> int | None:
    try:
        return opened.getexif().get(Base.Orientation)
    except Exception:  # PIL raises many types for a damaged EXIF block; the image itself is readable
        return None


def _ignored_contents(opened: Image.Image) -> str:
    ignored = []
    try:
        if opened.has_transparency_data and opened.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            ignored.append("transparency")
        # Phones save a photograph and its preview as MPO.
        if getattr(opened, "is_animated", False) and opened.format != "MPO":
            ignored.append("all frames but the first")
    except Exception:  # damage after the first frame, which training does not read
        ignored.append("damaged contents after the first frame")
    if opened.mode.startswith("I;16"):
        ignored.append("the lower 8 of 16 bits")
    return ", ".join(ignored)


class _InspectedImages(Dataset):
    """For each image, its facts or the reason it is unreadable, its perceptual hash, and its contrast."""

    def __init__(self, images: FileImages) -> None:
        assert images.root is not None
        samples = list(zip(images.paths, images.labels, strict=True))
        self.images = _FilesWithMetadata(images.root, samples, [])

    def __getitem__(self, index: int) -> tuple[ImageFacts | str, NDArray[np.uint64], float]:
        with warnings.catch_warnings(record=True, action="always") as caught:
            try:
                image = load_image(self.images, index)
            except UnreadableImage as error:
                path = self.images.root / self.images.paths[index]  # type: ignore[operator]
                reason = "an empty file" if _is_empty(path) else str(error).removeprefix(f"{path}: ")
                return reason, np.zeros(4, np.uint64), 0.0
        thumbnail = _thumbnail(image)
        pixels = np.asarray(thumbnail)
        facts = ImageFacts(
            size=image.size,
            rotated=self.images.rotated,
            ignored=self.images.ignored,
            decoder_warning="; ".join(dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught)),
            thumbnail_digest=hashlib.sha256(pixels.tobytes()).digest()[:16],
        )
        return facts, perceptual_hash(thumbnail), float(pixels.std())


def _is_empty(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size == 0
    except OSError:  # its folder may be listed only, or the file is gone
        return False


def _thumbnail(image: Image.Image) -> Image.Image:
    """A small grayscale copy to which every pixel contributes. Large images are averaged first, which is fast."""
    reduced = image.reduce((max(1, image.width // 64), max(1, image.height // 64)))
    return reduced.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)


def _collate(
    items: Sequence[tuple[ImageFacts | str, NDArray[np.uint64], float]],
) -> tuple[list[ImageFacts | str], NDArray[np.uint64], NDArray[np.float64]]:
    facts, hashes, contrasts = zip(*items, strict=True)
    return list(facts), np.stack(hashes), np.array(contrasts)


class _PixelDigests(Dataset):
    """For each image, the digest of its size and pixels, or the reason it is unreadable."""

    def __init__(self, images: FileImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> bytes | str:
        try:
            image = load_image(self.images, index)
        except UnreadableImage as error:  # raised by the parent, because from a worker it arrives as a traceback
            return str(error)
        return hashlib.sha256(str(image.size).encode() + image.tobytes()).digest()


def _batches(
    items: Dataset, indices: Sequence[int], collate: Callable[[list], Any], workers: int, advance: Callable[[int], None]
) -> Iterator[Any]:
    """The items at some indices, in their order, in collated batches."""
    loader: DataLoader = DataLoader(
        items,
        sampler=indices,
        batch_size=_BATCH,
        num_workers=min(workers, -(-len(indices) // _BATCH)),
        collate_fn=collate,
        worker_init_fn=init_worker,
    )
    for number, batch in enumerate(iterate_batches(loader)):
        yield batch
        advance(min(_BATCH, len(indices) - number * _BATCH))
