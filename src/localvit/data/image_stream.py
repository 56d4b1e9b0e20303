"""Labeled images that can only be read in order, such as those of a remote data set.

Each process reads its own shards, and hands the bytes of the images to its worker processes, which decode them. So only
the images that are being processed are in memory, and the number of workers changes nothing.

An image's position, (its shard, its index in the shard), does not depend on who reads it: the results of all processes,
sorted by it, are in the order of the data set.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from localvit.data.images import DataError, DatasetImages, Images, decode_bytes, prepare

Position = tuple[int, int]
"""The shard and the index in the shard."""


@dataclass(frozen=True, slots=True)
class StreamedImage:
    """One image of a stream, not yet decoded."""

    position: Position
    """Where it is in the stream."""
    name: str
    """Its name, for messages and results: the same whichever process reads it."""
    label: int
    """The class index."""
    content: bytes
    """The image file."""

    def load(self) -> Image.Image:
        """Decode it to RGB. Raises the decoder's exceptions."""
        return decode_bytes(self.content)

    def without_content(self) -> "StreamedImage":
        """What is needed of it after it was decoded."""
        return StreamedImage(self.position, self.name, self.label, b"")


class ImageStream(ABC):
    """Labeled images in shards, each of which can be read from its beginning."""

    title: str
    """Name of the data set, for messages."""
    class_names: list[str] | None
    """Name of each class, in label order; None if the data set has no class names."""
    num_shards: int
    """Number of shards, the same on every process."""
    num_images: int | None
    """Number of images, as the data set's description says; None if it does not."""

    @abstractmethod
    def read_shard(self, shard: int) -> Iterator[StreamedImage]:
        """The images of one shard, in order. Raises DataError, with the shard or the image, if it cannot be read."""

    def share(self, part: int, num_parts: int, limit: int | None = None) -> Iterator[StreamedImage]:
        """The images of one of several readers. Together they have each image once.

        A reader reads every `num_parts`-th shard. With fewer shards than readers, or with a limit, each reads all
        shards, as far as needed, and keeps every `num_parts`-th image.

        Args:
            part: the reader, from 0.
            num_parts: number of readers.
            limit: read only the first `limit` images of the stream.

        Raises:
            DataError: as `read_shard`.
        """
        whole_shards = limit is None and num_parts <= self.num_shards
        number = 0
        for shard in range(part, self.num_shards, num_parts) if whole_shards else range(self.num_shards):
            for image in self.read_shard(shard):
                if whole_shards or number % num_parts == part:
                    yield image
                number += 1
                if number == limit:
                    return


def check_count(title: str, expected: int | None, found: int) -> None:
    """Raise DataError if a data set has another number of images than its description says, if it says any."""
    if expected is not None and found != expected:
        raise DataError(
            f"--data-set {title}: its description says {expected:,} images, and its shards have {found:,}; copy them "
            "again, or correct the description"
        )


class PreparedStream(Dataset):
    """Transforms streamed images for a model. The "index" of an item is the image itself, which the sampler reads.

    Item: the image without its content, and a tensor (C, H, W), or the reason why it cannot be used.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __getitem__(self, image: StreamedImage) -> tuple[StreamedImage, Tensor | str]:
        return image.without_content(), prepare(image.load, image.name, self.transform)


def read_into_memory(stream: ImageStream) -> Images:
    """All images of a stream, as the bytes of their files, so that they can be read in any order.

    Raises DataError if the stream cannot be read, or contains no images.
    """
    images = list(stream.share(0, 1))
    if not images:
        raise DataError(f"--data-set {stream.title}: the stream contains no images")
    check_count(stream.title, stream.num_images, len(images))
    labels = [image.label for image in images]
    return DatasetImages(partial(_open, [image.content for image in images]), labels, stream.class_names, stream.title)


# A module function rather than a lambda, because worker processes receive it pickled.
def _open(contents: list[bytes], index: int) -> Image.Image:
    return decode_bytes(contents[index])
