"""The folder layout of a data set: its splits, and the files and folders that are not read."""

import mimetypes
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from localvit.data.folders import scan_folder
from localvit.data.images import DataError, FileImages
from localvit.dataset_check.findings import Finding, Location, finding_at

SPLITS = ("train", "val", "test")
UNSPLIT = "all"
"""Name of the only split of a folder that contains class folders directly."""


def join_split(split: str, path: str) -> str:
    """A path in a split, relative to the data set's folder."""
    return path if split == UNSPLIT else f"{split}/{path}"


class SplitImages(FileImages):
    """The images of all splits, one split after the other, with one list of classes for all of them."""

    def __init__(self, root: Path, splits: Mapping[str, FileImages]) -> None:
        names = sorted({name for images in splits.values() for name in images.class_names or []})
        index_of = {name: index for index, name in enumerate(names)}
        samples = [
            (join_split(split, path), index_of[(images.class_names or [])[label]])
            for split, images in splits.items()
            for path, label in zip(images.paths, images.labels, strict=True)
        ]
        super().__init__(root, samples, names)
        self.splits = list(splits)
        self.split_of = [position for position, images in enumerate(splits.values()) for _ in images.paths]


def open_splits(root: Path) -> tuple[dict[str, FileImages], list[Finding]]:
    """Open the usable splits of a data set, and find the problems of its folder layout.

    Raises DataError if `root` is not a folder.
    """
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of images" if root.exists() else f"no folder {root}")
    named = {name: root / name for name in SPLITS if (root / name).is_dir()}
    folders = named if {"train", "val"} & set(named) else {UNSPLIT: root}
    splits: dict[str, FileImages] = {}
    findings = [] if UNSPLIT in folders else _split_findings(root, folders)
    for name, folder in folders.items():
        try:
            splits[name], _ = scan_folder(folder)
        except (DataError, OSError) as error:
            findings += _unusable_split(name, error)
    return splits, findings + _skipped_findings(root, folders)


def _unusable_split(split: str, error: Exception) -> list[Finding]:
    locations = [Location(("." if split == UNSPLIT else split,), str(error))]
    title = "folders without labeled images"
    if split == "test":
        advice = "It was not checked. Training does not use test/."
        return finding_at("warning", "no-images", title, advice, locations)
    return finding_at("error", "no-images", title, "Training cannot start.", locations)


def _split_findings(root: Path, folders: Mapping[str, Path]) -> list[Finding]:
    """Find missing splits, and folders beside the splits."""
    findings = []
    if "train" not in folders:
        advice = f"There is nothing to train on. To check val only, give the folder {root / 'val'}."
        findings += finding_at("error", "no-train", "no train/ folder", advice, [Location((".",))])
    if "val" not in folders:
        advice = (
            f"There is nothing to evaluate on. Create a val/ folder, or train on {root / 'train'}: if a folder "
            "contains the class folders directly, part of each class is used for validation."
        )
        findings += finding_at("error", "no-val", "no val/ folder", advice, [Location((".",))])
    others = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "." and entry.name not in folders
    )
    advice = f"Only {', '.join(SPLITS)} are read. Rename the folder if it is meant to be one of them."
    locations = [Location((name,)) for name in others]
    return findings + finding_at("warning", "beside-splits", "folders beside the splits", advice, locations)


_SKIPPED = {
    "hidden-folders": (
        "hidden folders, which are skipped",
        "Names that begin with a dot are not read. Rename the folders if they contain images.",
    ),
    "hidden-files": (
        "hidden images, which are skipped",
        "Names that begin with a dot are not read. Rename the images, or delete them.",
    ),
    "outside-classes": (
        "images outside of the class folders, which are skipped",
        "The class of an image is its folder. Move the images into class folders.",
    ),
    "other-extensions": (
        "files that seem to be images, skipped because of their extension",
        f"Only {', '.join(IMG_EXTENSIONS)} are read. Convert the files, or rename those with a wrong extension.",
    ),
}


def _skipped_findings(root: Path, folders: Mapping[str, Path]) -> list[Finding]:
    """Find what `scan_folder` skips although it may have been meant to be used."""
    paths: dict[str, list[Path]] = defaultdict(list)
    if UNSPLIT not in folders:
        paths["outside-classes"] += [
            path for path in sorted(root.iterdir()) if path.is_file() and _has_image_extension(path.name)
        ]
    for folder in folders.values():
        for name, path in _skipped(folder):
            paths[name].append(path)
    findings = []
    for name, (title, advice) in _SKIPPED.items():
        locations = [Location((path.relative_to(root).as_posix(),)) for path in paths[name]]
        findings += finding_at("warning", name, title, advice, locations)
    return findings


def _skipped(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and folders of a split that are not read, each with the name of its finding."""
    visited = set()
    for directory, subdirectories, files in os.walk(folder, followlinks=True):
        if (target := Path(directory).resolve()) in visited:  # a link to a parent folder would loop forever
            subdirectories.clear()
            continue
        visited.add(target)
        yield from (("hidden-folders", Path(directory, name)) for name in sorted(subdirectories) if name[0] == ".")
        subdirectories[:] = sorted(name for name in subdirectories if name[0] != ".")
        in_class = Path(directory) != folder
        for name in sorted(files):
            path = Path(directory, name)
            if name.startswith("._"):  # macOS stores file attributes there, with the same extension
                continue
            if _has_image_extension(name) and (name[0] == "." or not in_class):
                yield "hidden-files" if name[0] == "." else "outside-classes", path
            elif in_class and name[0] != "." and not _has_image_extension(name) and _may_be_image(path):
                yield "other-extensions", path


def _has_image_extension(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _may_be_image(path: Path) -> bool:
    """Whether a file seems to be an image, by its extension or, for PIL, by its first bytes."""
    kind, _ = mimetypes.guess_type(path.name)
    if kind is not None and kind.startswith("image/"):
        return True
    if not path.is_file():  # a broken link, or a pipe, which would block
        return False
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            return Image.MIME.get(opened.format or "", "").startswith("image/")
    except Exception:  # PIL raises many types for arbitrary bytes
        return False
