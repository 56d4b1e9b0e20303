"""Image files: folders with one subfolder per class, and the files, folders and patterns that a user names."""

import glob
import logging
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from localvit.data.class_folders import read_folder
from localvit.data.image_files import FoundFiles, describe_left_out, find_images, image_extensions, looks_like_image
from localvit.data.images import DataError, FileImages, ImageSequence, UnreadableImage, open_image

logger = logging.getLogger(__name__)


def scan_folder(root: Path, *, is_split: bool = False) -> tuple[FileImages, list[str]]:
    """List the images of a folder that has one subfolder per class: `read_folder`'s images and warnings."""
    scanned = read_folder(root, is_split=is_split)
    return scanned.images, scanned.warnings()


class PathImages(ImageSequence):
    """Unlabeled images given by files, folders and glob patterns, in the given order.

    A file is included with any extension, as often as it is given. A folder includes the images in it and in its
    subfolders, without hidden ones. A pattern (`*`, `?`, `[abc]`, and `**` for any subfolders) includes the images it
    matches and the images in the folders it matches, each once. A path that leads to no image keeps its position as
    an unreadable image.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path]) -> None:
        """Logs which files were left out because of their extension.

        Raises DataError, with the reasons, if no path leads to an image, and TypeError for anything but paths.
        """
        left_out: list[Path] = []
        paths = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
        if others := [each for each in paths if not isinstance(each, str | Path)]:
            raise TypeError(
                f"images are given by their paths, or as an ImageSequence (localvit.data.images); a "
                f"{type(others[0]).__name__} is neither"
            )
        found = [entry for path in paths for entry in _expand(str(path), left_out)]
        self.paths = [path for path, _ in found]
        self.problems = {index: problem for index, (_, problem) in enumerate(found) if problem}
        if len(self.problems) == len(self.paths):
            reasons = "; ".join(f"{self.paths[index]}: {problem}" for index, problem in self.problems.items())
            reasons += f"; {describe_left_out(left_out)}" if left_out else ""
            raise DataError(f"no images found ({reasons or 'no path was given'})")
        if left_out:
            logger.warning(describe_left_out(list(dict.fromkeys(left_out))))

    def load(self, index: int) -> Image.Image:
        if index in self.problems:
            raise UnreadableImage(f"{self.paths[index]}: {self.problems[index]}")
        return open_image(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)


def _expand(path: str, left_out: list[Path]) -> list[tuple[str, str | None]]:
    """The image paths of a path or pattern, or the path itself and its problem. Adds to `left_out`."""
    if not path:  # pathlib would take it for the current folder
        return [(path, "an empty path")]
    try:
        if Path(path).is_dir():
            found = find_images(Path(path))
            images = found.images
            left_out += found.left_out
            problem = "a folder without images"
        elif Path(path).exists():
            return [(path, None)]
        else:
            matches = map(Path, sorted(glob.glob(path, recursive=True)))  # noqa: PTH207 (Path.glob shows hidden files)
            # `**` matches both a folder and its contents, so remove duplicates.
            all_found = [_files_at(match) for match in matches]
            images = list(dict.fromkeys(image for found in all_found for image in found.images))
            left_out += [path for found in all_found for path in found.left_out]
            problem = "no image matches this pattern" if glob.has_magic(path) else "no such file or folder"
    except OSError as error:
        return [(path, f"cannot be listed ({error.strerror}: {error.filename})")]
    return [(str(image), None) for image in images] or [(path, problem)]


def _files_at(path: Path) -> FoundFiles:
    """The images in a folder, or the path itself if it is an image file."""
    if path.is_dir():
        return find_images(path)
    if path.name.lower().endswith(image_extensions()):
        return FoundFiles(images=[path])
    return FoundFiles(left_out=[path] if looks_like_image(path) else [])
