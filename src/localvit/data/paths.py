"""The images that a person mentions: files, folders and patterns."""

import glob
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from localvit.data.images import DataError, ImageSequence, UnreadableImage, images_below, open_image


class MentionedImages(ImageSequence):
    """The images of some files, folders and patterns, in the order given, without labels.

    A file is taken as it is, whatever its ending, and as often as it is mentioned. A folder stands for the images in
    it and its sub-folders, hidden ones left out. A pattern (`*`, `?`, `[abc]`, and `**` for any sub-folders) stands for
    the images that it matches and those in folders that it matches, each once. A mention that leads to no image
    keeps its place, as an image that cannot be read.

    Raises DataError, with the reasons, when no mention leads to an image.
    """

    def __init__(self, mentions: Iterable[str]) -> None:
        found = [entry for mention in mentions for entry in _find(mention)]
        self.paths = [path for path, _ in found]
        self.problems = {index: problem for index, (_, problem) in enumerate(found) if problem}
        if len(self.problems) == len(self.paths):
            reasons = "; ".join(f"{self.paths[index]}: {problem}" for index, problem in self.problems.items())
            raise DataError(f"no image to look at ({reasons or 'nothing was named'})")

    def load(self, index: int) -> Image.Image:
        if index in self.problems:
            raise UnreadableImage(f"{self.paths[index]}: {self.problems[index]}")
        return open_image(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)


def _find(mention: str) -> list[tuple[str, str | None]]:
    """The paths that a mention stands for, or the mention itself with what is wrong with it."""
    try:
        if Path(mention).is_dir():
            images = _images(Path(mention))
            problem = "a folder without images"
        elif Path(mention).exists():
            return [(mention, None)]
        else:
            matches = map(Path, sorted(glob.glob(mention, recursive=True)))  # noqa: PTH207 (Path.glob shows hidden files)
            # Once each: `**` matches a folder and what is in it alike.
            images = list(dict.fromkeys(path for match in matches for path in _images(match)))
            problem = "no image matches this pattern" if glob.has_magic(mention) else "no such file or folder"
    except OSError as error:
        return [(mention, f"cannot be looked into ({error.strerror}: {error.filename})")]
    return [(str(path), None) for path in images] or [(mention, problem)]


def _images(path: Path) -> list[Path]:
    """The images in a folder, or the path itself if it is an image's."""
    if path.is_dir():
        return images_below(path)
    return [path] if path.name.lower().endswith(IMG_EXTENSIONS) else []
