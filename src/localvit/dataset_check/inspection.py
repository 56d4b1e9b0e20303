"""One look at every image of a folder, in parallel: whether it can be read, and what there is to know about it."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from torch.utils.data import DataLoader, Dataset

from localvit.data.images import FileImages, UnreadableImage, load_image, to_rgb
from localvit.data.workers import leave_quietly, loaded
from localvit.dataset_check.perceptual_hash import THUMBNAIL_SIDE, perceptual_hash

_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What there is to know about an image that can be read."""

    size: tuple[int, int]
    """Width and height in pixels, as decoded."""
    turned: bool
    """Whether the file asks viewers to turn or mirror the image (EXIF), which training does not do."""
    unseen: str
    """What the file holds but training does not see; empty if there is nothing."""
    remark: str
    """What the decoder remarked, while it read the image all the same."""
    thumbnail_digest: bytes
    """Equal for images of equal pixels, and for some others."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that one look at N images tells."""

    facts: list[ImageFacts | str]
    """Of each image, or why it cannot be read."""
    hashes: NDArray[np.uint64]
    """`perceptual_hash` of each image, (N, 4); of no meaning for one that cannot be read."""
    contrasts: NDArray[np.float64]
    """Standard deviation of each thumbnail's gray levels (0 to 255), (N,); 0 for an image that cannot be read."""


def inspect(images: FileImages, workers: int, advance: Callable[[int], None] = lambda done: None) -> Inspection:
    """Look at each image. Each is decoded once, by one of `workers` processes, or by this one if 0.

    Raises RuntimeError when a worker process dies.
    """
    batches = list(_each(_Looks(images), range(len(images)), _summarized, workers, advance))
    return Inspection(
        facts=[facts for batch, _, _ in batches for facts in batch],
        hashes=np.concatenate([hashes for _, hashes, _ in batches]),
        contrasts=np.concatenate([contrasts for _, _, contrasts in batches]),
    )


def pixel_digests(images: FileImages, indices: Sequence[int], workers: int) -> list[bytes]:
    """For each of `indices`, a digest of that image's size and decoded pixels.

    Raises UnreadableImage when one can no longer be read, and RuntimeError when a worker process dies.
    """
    batches = _each(_PixelDigests(images), indices, list, workers, lambda done: None)
    return [digest for batch in batches for digest in batch]


class _FileNoted(FileImages):
    """Images in files, with notes on what the file of the last one holds beside its pixels."""

    turned = False
    unseen = ""

    def load(self, index: int) -> Image.Image:
        assert self.root is not None
        with Image.open(self.root / self.paths[index]) as opened:
            image = to_rgb(opened)
            self.turned = _orientation(opened) in range(2, 9)
            self.unseen = ", ".join(_unseen(opened))
        return image


def _orientation(opened: Image.Image) -> int | None:
    try:
        return opened.getexif().get(Base.Orientation)
    except Exception:  # whatever a broken EXIF block makes of PIL's parser; the image itself can be read
        return None


def _unseen(opened: Image.Image) -> list[str]:
    unseen = []
    if opened.has_transparency_data and opened.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        unseen.append("transparency")
    if (
        getattr(opened, "is_animated", False) and opened.format != "MPO"
    ):  # a telephone's previews, beside its photograph
        unseen.append("all frames but the first")
    if opened.mode.startswith("I;16"):
        unseen.append("the lower 8 of 16 bits")
    return unseen


class _Looks(Dataset):
    """Each image's facts, or why it cannot be read, and its thumbnail."""

    def __init__(self, images: FileImages) -> None:
        assert images.root is not None
        samples = list(zip(images.paths, images.labels, strict=True))
        self.images = _FileNoted(images.root, samples, [])

    def __getitem__(self, index: int) -> tuple[ImageFacts | str, np.ndarray]:
        with warnings.catch_warnings(record=True, action="always") as remarks:
            try:
                image = load_image(self.images, index)
            except UnreadableImage as error:
                path = self.images.root / self.images.paths[index]  # type: ignore[operator]
                empty = path.exists() and path.stat().st_size == 0
                reason = "an empty file" if empty else str(error).removeprefix(f"{path}: ")
                return reason, np.zeros((THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.uint8)
        thumbnail = _thumbnail(image)
        facts = ImageFacts(
            size=image.size,
            turned=self.images.turned,
            unseen=self.images.unseen,
            remark="; ".join(dict.fromkeys(str(remark.message).splitlines()[0] for remark in remarks)),
            thumbnail_digest=hashlib.sha256(thumbnail.tobytes()).digest()[:16],
        )
        return facts, thumbnail


def _thumbnail(image: Image.Image) -> np.ndarray:
    """Gray levels (S, S), in which every pixel counts; those of a large image by way of averages, which are quick."""
    rough = image.reduce((max(1, image.width // 64), max(1, image.height // 64)))
    return np.asarray(rough.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS))


def _summarized(looks: Sequence[tuple[ImageFacts | str, np.ndarray]]) -> tuple[list, np.ndarray, np.ndarray]:
    thumbnails_NSS = np.stack([thumbnail for _, thumbnail in looks])
    return [facts for facts, _ in looks], perceptual_hash(thumbnails_NSS), thumbnails_NSS.std(axis=(1, 2))


class _PixelDigests(Dataset):
    def __init__(self, images: FileImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> bytes:
        image = load_image(self.images, index)
        return hashlib.sha256(str(image.size).encode() + image.tobytes()).digest()


def _each(
    items: Dataset, indices: Sequence[int], collate: Callable[[list], Any], workers: int, advance: Callable[[int], None]
) -> Iterator[Any]:
    """Batches of `items[index]` for each of `indices`, in their order."""
    loader: DataLoader = DataLoader(
        items,
        sampler=indices,
        batch_size=_BATCH,
        num_workers=min(workers, -(-len(indices) // _BATCH)),
        collate_fn=collate,
        worker_init_fn=leave_quietly,
    )
    for number, batch in enumerate(loaded(loader)):
        yield batch
        advance(min(_BATCH, len(indices) - number * _BATCH))
