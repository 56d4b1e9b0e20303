"""Which files below a folder are images, by their extension, and which seem to be images but are left out."""

import mimetypes
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

_FURTHER_EXTENSIONS = (
    *(".apng", ".avif", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpx", ".mpo"),
    *(".pbm", ".pnm"),
)
"""Read besides torchvision's extensions, each where PIL has a decoder for it (.heic with the package pillow-heif)."""
_UNREAD_EXTENSIONS = (".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef")
"""Extensions of images that the standard library may not know."""
SYSTEM_FOLDERS = {
    "__MACOSX": "contains file attributes of macOS",
    "@eaDir": "contains thumbnails and file attributes of a Synology NAS",
    "lost+found": "belongs to the file system",
    "$RECYCLE.BIN": "contains deleted files of Windows",
    "System Volume Information": "belongs to Windows",
}
"""Folders that systems create among a user's, and what each is. They are not read, and some cannot be listed."""
_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt")


def image_extensions() -> tuple[str, ...]:
    """The extensions of the files that are read as images: torchvision's, and others that PIL can decode."""
    formats = Image.registered_extensions()
    return (*IMG_EXTENSIONS, *(each for each in _FURTHER_EXTENSIONS if formats.get(each) in Image.OPEN))


@dataclass(kw_only=True)
class FoundFiles:
    """The visible files below a folder."""

    images: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    """Files that seem to be images but have another extension."""
    weights: list[Path] = field(default_factory=list)
    """Files with the extension of model weights, which training writes."""
    num_others: int = 0


def find_images(folder: Path) -> FoundFiles:
    """Find the image files in a folder and its subfolders, sorted within each folder, without hidden ones.

    Symbolic links are followed, to each folder once, and not back to a folder that contains this one. Raises OSError
    for a folder that cannot be listed.
    """
    found = FoundFiles()
    extensions = image_extensions()
    for directory, files in walk_visible(folder):
        for path in (Path(directory, name) for name in files if not name.startswith(".")):
            name = path.name.lower()
            if name.endswith(extensions):
                found.images.append(path)
            elif name.endswith(_WEIGHTS):
                found.weights.append(path)
            elif looks_like_image(path):
                found.left_out.append(path)
            else:
                found.num_others += 1
    return found


def walk_visible(folder: Path, *, without: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `folder` down, and the sorted names of its files. Raises OSError.

    Leaves out hidden folders, those of systems, and, directly in `folder`, those named in `without`.
    """
    visited = set(folder.resolve().parents)  # a link back to one would lead to the other classes
    for directory, subfolders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (target := Path(directory).resolve()) in visited:  # a link to a parent folder would loop forever
            subfolders.clear()
            continue
        visited.add(target)
        unread = {*SYSTEM_FOLDERS, *(without if Path(directory) == folder else ())}
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in unread)
        yield directory, sorted(files)


def _raise(error: OSError) -> None:
    raise error


def looks_like_image(path: Path) -> bool:
    """Whether a file seems to be an image, by its extension or, if that is unknown, by its first bytes."""
    kind, _ = mimetypes.guess_type(path.name)
    if path.suffix.lower() in _UNREAD_EXTENSIONS:
        return True
    if kind is not None:
        return kind.startswith("image/")
    try:
        if not path.is_file():  # a broken link, or a pipe, which would block
            return False
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            return Image.MIME.get(opened.format or "", "").startswith("image/")
    except Exception:  # PIL raises many types for arbitrary bytes; or the file may not be read
        return False


def describe_left_out(paths: Sequence[Path]) -> str:
    """One line about files that were left out because of their extension."""
    counts = Counter(path.suffix.lower() or "none" for path in paths)
    listed = ", ".join(f"{extension}: {count:,}" for extension, count in counts.most_common(5))
    files = "1 image is" if len(paths) == 1 else f"{len(paths):,} images are"
    return f"{files} not read because of the extension ({listed}), such as {paths[0]}; convert to PNG or JPEG"
