"""How the folders of a data set lie: its splits, and everything in them that is not read."""

import mimetypes
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from localvit.data.images import DataError, FileImages, scan_folder
from localvit.dataset_check.findings import Finding, Place, found

SPLITS = ("train", "val", "test")
UNSPLIT = "all"
"""What the images are called where the class folders lie directly in the data set's folder."""


def below(split: str, path: str) -> str:
    """The path, from the data set's folder, of what lies at `path` in a split."""
    return path if split == UNSPLIT else f"{split}/{path}"


class SplitImages(FileImages):
    """The images of all splits as one sequence, split after split; classes are numbered over all of them."""

    def __init__(self, root: Path, splits: Mapping[str, FileImages]) -> None:
        names = sorted({name for images in splits.values() for name in images.class_names or []})
        index_of = {name: index for index, name in enumerate(names)}
        samples = [
            (below(split, path), index_of[(images.class_names or [])[label]])
            for split, images in splits.items()
            for path, label in zip(images.paths, images.labels, strict=True)
        ]
        super().__init__(root, samples, names)
        self.splits = list(splits)
        self.split_of = [place for place, images in enumerate(splits.values()) for _ in images.paths]


def open_splits(root: Path) -> tuple[dict[str, FileImages], list[Finding]]:
    """The images of each split that can be used, and what is wrong with how the folders lie.

    Raises DataError when `root` is no folder.
    """
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of images" if root.exists() else f"no folder {root}")
    named = {name: root / name for name in SPLITS if (root / name).is_dir()}
    folders = named if {"train", "val"} & set(named) else {UNSPLIT: root}
    splits: dict[str, FileImages] = {}
    findings = [] if UNSPLIT in folders else _beside(root, folders)
    for name, folder in folders.items():
        try:
            splits[name], _ = scan_folder(folder)
        except (DataError, OSError) as error:
            findings += _unusable(name, error)
    return splits, findings + _left_out(root, folders)


def _unusable(split: str, error: Exception) -> list[Finding]:
    places = [Place(("." if split == UNSPLIT else split,), str(error))]
    title = "folders that give no labeled images"
    if split == "test":
        advice = "It is not compared with the others. Training does not read test/."
        return found("warning", "no-images", title, advice, places)
    return found("error", "no-images", title, "Training stops before it begins.", places)


def _beside(root: Path, folders: Mapping[str, Path]) -> list[Finding]:
    """Findings on what lies in the data set's folder, or does not, where that has splits."""
    findings = []
    if "train" not in folders:
        advice = f"There is nothing to train on. To look at val alone, check {root / 'val'}."
        findings += found("error", "no-train", "no train/ folder", advice, [Place((".",))])
    if "val" not in folders:
        advice = (
            f"There is nothing to evaluate on. Make a val/ folder, or train on {root / 'train'}: of a folder that "
            "holds the class folders itself, part of each class is kept for evaluation."
        )
        findings += found("error", "no-val", "no val/ folder", advice, [Place((".",))])
    others = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "." and entry.name not in folders
    )
    advice = f"Only {', '.join(SPLITS)} are read, under these very names. Rename what is meant to be one of them."
    places = [Place((name,)) for name in others]
    return findings + found("warning", "beside-splits", "folders beside the splits", advice, places)


_LEFT_OUT = {
    "hidden-folders": (
        "hidden folders, which are left out",
        "Names that begin with a dot are not read. Rename the folders if they hold images.",
    ),
    "hidden-files": (
        "hidden images, which are left out",
        "Names that begin with a dot are not read. Rename the images, or delete them.",
    ),
    "outside-classes": (
        "images outside of any class folder, which are left out",
        "An image's class is the folder that it lies in. Move them into one.",
    ),
    "other-endings": (
        "files that seem to be images, left out for their endings",
        f"Only {', '.join(IMG_EXTENSIONS)} are read. Convert the files, or rename those whose ending alone is wrong.",
    ),
}


def _left_out(root: Path, folders: Mapping[str, Path]) -> list[Finding]:
    """Findings on what `scan_folder` passes over and that may have been meant to count."""
    paths: dict[str, list[Path]] = defaultdict(list)
    if UNSPLIT not in folders:
        paths["outside-classes"] += [
            path for path in sorted(root.iterdir()) if path.is_file() and _has_ending(path.name)
        ]
    for folder in folders.values():
        for name, path in _passed_over(folder):
            paths[name].append(path)
    findings = []
    for name, (title, advice) in _LEFT_OUT.items():
        places = [Place((path.relative_to(root).as_posix(),)) for path in paths[name]]
        findings += found("warning", name, title, advice, places)
    return findings


def _passed_over(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and folders in a split that are not read, each with the name of its finding."""
    walked = set()
    for directory, subdirectories, files in os.walk(folder, followlinks=True):
        if (where := Path(directory).resolve()) in walked:  # a link to a folder above would lead around in circles
            subdirectories.clear()
            continue
        walked.add(where)
        yield from (("hidden-folders", Path(directory, name)) for name in sorted(subdirectories) if name[0] == ".")
        subdirectories[:] = sorted(name for name in subdirectories if name[0] != ".")
        in_class = Path(directory) != folder
        for name in sorted(files):
            path = Path(directory, name)
            if name.startswith("._"):  # macOS keeps a file's attributes there, under the same ending
                continue
            if _has_ending(name) and (name[0] == "." or not in_class):
                yield "hidden-files" if name[0] == "." else "outside-classes", path
            elif in_class and name[0] != "." and not _has_ending(name) and _may_be_image(path):
                yield "other-endings", path


def _has_ending(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _may_be_image(path: Path) -> bool:
    """Whether the ending or, for PIL, the first bytes of a file say that it is an image."""
    kind, _ = mimetypes.guess_type(path.name)
    if kind is not None and kind.startswith("image/"):
        return True
    if not path.is_file():  # a link to nowhere; or a pipe, which would keep its reader waiting
        return False
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            return Image.MIME.get(opened.format or "", "").startswith("image/")
    except Exception:  # whatever PIL makes of bytes that may be anything
        return False
