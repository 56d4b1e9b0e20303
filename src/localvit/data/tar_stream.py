"""Labeled images in the tar files of a webdataset that are compressed or on another machine, read as a stream.

webdataset opens the files: local ones, http(s)://, and what the programs of cloud storages and hf:// can read. Its own
reader leaves out a shard or an image that cannot be read, with a message; here that is an error.
"""

import contextlib
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby

from localvit.data.image_stream import ImageStream, StreamedImage
from localvit.data.images import DataError, reason_of
from localvit.data.tar_shards import MEMBER

_Member = tuple[str, str, bytes]
"""The key of the sample, the extension, and the content."""


class TarStream(ImageStream):
    """The images of tar files in the order of the files, each with its label beside it."""

    class_names = None

    def __init__(
        self,
        urls: Sequence[str],
        image_extensions: Sequence[str],
        *,
        title: str,
        num_images: int | None = None,
        json_label: str = "",
    ) -> None:
        """
        Args:
            urls: paths or addresses of the tar files.
            image_extensions: extensions of the images, such as jpg.
            title: name of the data set, for messages.
            num_images: number of images, if it is known.
            json_label: the field of a sample's `.json` that has the label; by default the label is in its `.cls`. A
                negative one means that the image is not of the split; it is left out.
        """
        self.urls = list(urls)
        self.image_extensions = frozenset(image_extensions)
        self.title = title
        self.json_label = json_label
        self.num_shards = len(self.urls)
        self.num_images = None if json_label else num_images  # which counts the images that are left out as well

    def read_shard(self, shard: int) -> Iterator[StreamedImage]:
        url = self.urls[shard]
        try:
            for index, (key, members) in enumerate(groupby(_members(url), lambda member: member[0])):
                image = self._image(f"{posixpath.basename(url)}/{key}", (shard, index), list(members))
                if image.label >= 0 or not self.json_label:
                    yield image
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"--data-set {self.title}: {url} cannot be read to its end as a tar file ({reason_of(error)})"
            ) from error

    def _image(self, name: str, position: tuple[int, int], members: list[_Member]) -> StreamedImage:
        images = [content for _, extension, content in members if extension in self.image_extensions]
        if len(images) != 1:
            raise DataError(
                f"--data-set {self.title}: the sample {name} has {len(images) or 'no'} image{'s' * bool(images)}; in a "
                "stream, the files of a sample must follow one another"
            )
        kind = "json" if self.json_label else "cls"
        labels = [content for _, extension, content in members if extension == kind]
        if not labels:
            raise DataError(
                f"--data-set {self.title}: the sample {name} has no label (.{kind}); in a stream, the files of a "
                "sample must follow one another"
            )
        try:
            label = int(json.loads(labels[0])[self.json_label] if self.json_label else labels[0])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"--data-set {self.title}: the label of the sample {name} is not a number ({reason_of(error)})"
            ) from error
        return StreamedImage(position, name, label, images[0])


def _members(url: str) -> Iterator[_Member]:
    """The files of a tar file that belong to samples."""
    import webdataset

    file = webdataset.gopen(url)
    finished = False
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                found = MEMBER.fullmatch(member.name) if member.isreg() else None
                content = archive.extractfile(member) if found else None
                if found and content:
                    yield found[1], found[2].lower(), content.read()
        finished = True
    finally:
        # After the end, closing raises OSError if the transfer failed. Where the rest is not needed, it may fail.
        with contextlib.nullcontext() if finished else contextlib.suppress(OSError):
            file.close()
