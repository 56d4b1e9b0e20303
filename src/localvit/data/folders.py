"""Image files: folders with one subfolder per class, and the files, folders and patterns that a user names."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from localvit.data.images import DataError, FileImages, ImageSequence, UnreadableImage, open_image


def scan_folder(root: Path) -> tuple[FileImages, list[str]]:
    """List the images of a folder that has one subfolder per class.

    Classes are the visible subfolders, sorted by name, as in torchvision's ImageFolder. The images of a class may be
    in subfolders of its folder. Hidden files and folders are skipped. A class folder without images is still a class.

    Returns:
        The images, and a warning for each hidden folder and each class folder without images.

    Raises:
        DataError: `root` is not a folder, has no class folders, or has no images.
    """
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of class folders" if root.exists() else f"no folder {root}")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    class_names = [name for name in folders if not name.startswith(".")]
    if not class_names:
        raise DataError(f"{root} has no class folders; create one subfolder per class and move the images there")
    warnings = [f"skipped the hidden folder {root / name}" for name in folders if name.startswith(".")]
    samples = []
    for label, class_name in enumerate(class_names):
        paths = find_images(root / class_name)
        if not paths:
            warnings.append(f"the class folder {root / class_name} contains no images")
        samples += [(path.relative_to(root).as_posix(), label) for path in paths]
    if not samples:
        raise DataError(f"{root} has {len(class_names)} class folders but no images ({', '.join(IMG_EXTENSIONS)})")
    return FileImages(root, samples, class_names), warnings


def find_images(folder: Path) -> list[Path]:
    """List the image files in a folder and its subfolders, sorted within each folder, without hidden ones.

    Symbolic links are followed, to each folder once. Raises OSError for a folder that cannot be listed.
    """
    found: list[Path] = []
    visited = set()
    for directory, subfolders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (target := Path(directory).resolve()) in visited:  # a link to a parent folder would loop forever
            subfolders.clear()
            continue
        visited.add(target)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(directory, name)
            for name in sorted(files)
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    return found


def _raise(error: OSError) -> None:
    raise error


class PathImages(ImageSequence):
    """Unlabeled images given by files, folders and glob patterns, in the given order.

    A file is included with any extension, as often as it is given. A folder includes the images in it and in its
    subfolders, without hidden ones. A pattern (`*`, `?`, `[abc]`, and `**` for any subfolders) includes the images it
    matches and the images in the folders it matches, each once. A path that leads to no image keeps its position as
    an unreadable image.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        """Raises DataError, with the reasons, if no path leads to an image."""
        found = [entry for path in paths for entry in _expand(str(path))]
        self.paths = [path for path, _ in found]
        self.problems = {index: problem for index, (_, problem) in enumerate(found) if problem}
        if len(self.problems) == len(self.paths):
            reasons = "; ".join(f"{self.paths[index]}: {problem}" for index, problem in self.problems.items())
            raise DataError(f"no images found ({reasons or 'no path was given'})")

    def load(self, index: int) -> Image.Image:
        if index in self.problems:
            raise UnreadableImage(f"{self.paths[index]}: {self.problems[index]}")
        return open_image(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)


def _expand(path: str) -> list[tuple[str, str | None]]:
    """The image paths of a path or pattern, or the path itself and its problem."""
    try:
        if Path(path).is_dir():
            images = find_images(Path(path))
            problem = "a folder without images"
        elif Path(path).exists():
            return [(path, None)]
        else:
            matches = map(Path, sorted(glob.glob(path, recursive=True)))  # noqa: PTH207 (Path.glob shows hidden files)
            # `**` matches both a folder and its contents, so remove duplicates.
            images = list(dict.fromkeys(image for match in matches for image in _images_at(match)))
            problem = "no image matches this pattern" if glob.has_magic(path) else "no such file or folder"
    except OSError as error:
        return [(path, f"cannot be listed ({error.strerror}: {error.filename})")]
    return [(str(image), None) for image in images] or [(path, problem)]


def _images_at(path: Path) -> list[Path]:
    """The images in a folder, or the path itself if it is an image file."""
    if path.is_dir():
        return find_images(path)
    return [path] if path.name.lower().endswith(IMG_EXTENSIONS) else []
