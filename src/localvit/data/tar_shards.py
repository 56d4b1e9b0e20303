"""Labeled images in the tar files of a webdataset, read where they are.

webdataset reads its shards as a stream, of which each process and worker gets some shards; a shard that fits no worker
or an image that cannot be read is left out with a message. For an evaluation that counts each image once, the shards
are indexed instead: the headers of the tar files say where each image begins. Only the index is kept in memory.
"""

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from localvit.data.images import DataError, Images, decode_bytes

MEMBER = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]+)")
"""webdataset's division of a path: the sample's key, up to the first dot of the file's name, and the extension."""

_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
"""How files of gzip, bzip2, xz and Zstandard begin."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an image is."""

    shard: int
    offset: int
    size: int
    key: str


class TarShards(Images):
    """The images of tar files in the order of the files, each with its label in a member of the same key."""

    fixed_order = True
    class_names = None

    def __init__(self, shards: Sequence[Path], image_extensions: Sequence[str], *, title: str) -> None:
        """
        Args:
            shards: tar files without compression.
            image_extensions: extensions of the images, such as jpg.
            title: name of the data set, for messages.

        Raises:
            DataError: if a file is not a complete tar file, or a sample lacks its image or its label (`.cls`).
        """
        self.shards = list(shards)
        self.title = title
        self.labels: list[int] = []
        self.entries: list[_Entry] = []
        for number, shard in enumerate(self.shards):
            self._index(number, shard, frozenset(image_extensions))
        if not self.entries:
            raise DataError(f"--data-set {title}: the shards contain no images")

    def _index(self, number: int, shard: Path, extensions: frozenset[str]) -> None:
        images: dict[str, _Entry] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    found = MEMBER.fullmatch(member.name) if member.isreg() else None
                    if found is None:
                        continue
                    key, extension = found[1], found[2].lower()
                    if extension in extensions:
                        if key in images:
                            raise DataError(f"--data-set {self.title}: {shard} has two images of the sample {key}")
                        images[key] = _Entry(number, member.offset_data, member.size, key)
                    elif extension == "cls":
                        content = archive.extractfile(member)
                        labels[key] = int(content.read()) if content else -1
                end = archive.offset
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"--data-set {self.title}: {shard} cannot be read as a tar file ({error})") from error
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"--data-set {self.title}: {shard} has a label that is not a number ({error})") from error
        if end > shard.stat().st_size:
            raise DataError(f"--data-set {self.title}: {shard} is truncated; copy it again")
        if different := sorted(images.keys() ^ labels.keys()):
            lacks = "image" if different[0] in labels else "label (.cls)"
            raise DataError(f"--data-set {self.title}: the sample {different[0]} in {shard} has no {lacks}")
        self.entries += images.values()
        self.labels += [labels[key] for key in images]

    def load(self, index: int) -> Image.Image:
        entry = self.entries[index]
        with self.shards[entry.shard].open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.size)
        return decode_bytes(content)

    def name(self, index: int) -> str:
        entry = self.entries[index]
        return f"{self.shards[entry.shard].name}/{entry.key}"


def is_plain_tar(path: Path) -> bool:
    """Whether this is a file on this machine that is not compressed."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) not in _COMPRESSED
