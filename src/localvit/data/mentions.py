"""The pictures that a person mentions: files, folders and patterns."""

import glob
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from localvit.data.pictures import DataError, PictureSequence, UnreadablePicture, open_picture, pictures_below


class MentionedPictures(PictureSequence):
    """The pictures of some files, folders and patterns, in the order given, without labels.

    A file is taken as it is, whatever its ending, and as often as it is mentioned. A folder stands for the pictures in
    it and its sub-folders, hidden ones left out. A pattern (`*`, `?`, `[abc]`, and `**` for any sub-folders) stands for
    the pictures that it matches and those in folders that it matches, each once. A mention that leads to no picture
    keeps its place, as a picture that cannot be read.

    Raises DataError, with the reasons, when no mention leads to a picture.
    """

    def __init__(self, mentions: Iterable[str]) -> None:
        found = [entry for mention in mentions for entry in _find(mention)]
        self.paths = [path for path, _ in found]
        self.problems = {index: problem for index, (_, problem) in enumerate(found) if problem}
        if len(self.problems) == len(self.paths):
            reasons = "; ".join(f"{self.paths[index]}: {problem}" for index, problem in self.problems.items())
            raise DataError(f"no picture to look at ({reasons or 'nothing was named'})")

    def load(self, index: int) -> Image.Image:
        if index in self.problems:
            raise UnreadablePicture(f"{self.paths[index]}: {self.problems[index]}")
        return open_picture(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)


def _find(mention: str) -> list[tuple[str, str | None]]:
    """The paths that a mention stands for, or the mention itself with what is wrong with it."""
    try:
        if Path(mention).is_dir():
            pictures = _pictures(Path(mention))
            problem = "a folder without pictures"
        elif Path(mention).exists():
            return [(mention, None)]
        else:
            matches = map(Path, sorted(glob.glob(mention, recursive=True)))  # noqa: PTH207 (Path.glob shows hidden files)
            # Once each: `**` matches a folder and what is in it alike.
            pictures = list(dict.fromkeys(path for match in matches for path in _pictures(match)))
            problem = "no picture matches this pattern" if glob.has_magic(mention) else "no such file or folder"
    except OSError as error:
        return [(mention, f"cannot be looked into ({error.strerror}: {error.filename})")]
    return [(str(path), None) for path in pictures] or [(mention, problem)]


def _pictures(path: Path) -> list[Path]:
    """The pictures in a folder, or the path itself if it is a picture's."""
    if path.is_dir():
        return pictures_below(path)
    return [path] if path.name.lower().endswith(IMG_EXTENSIONS) else []
