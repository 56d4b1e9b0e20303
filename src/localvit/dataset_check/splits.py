"""The folder layout of a data set: its splits, and the files and folders that are not read."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from localvit.data.class_folders import SPLITS, ScannedFolder, folders_beside_splits, is_validation_name, read_folder
from localvit.data.image_files import image_extensions, looks_like_image, walk_visible
from localvit.data.images import DataError, FileImages
from localvit.dataset_check.findings import Finding, Location, Severity, finding_at

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
    scans: dict[str, ScannedFolder] = {}
    findings = [] if UNSPLIT in folders else _split_findings(root, folders)
    for name, folder in folders.items():
        try:
            scans[name] = read_folder(folder, is_split=name != UNSPLIT)
        except (DataError, OSError) as error:
            findings += _unusable_split(name, error)
    findings += _doubtful_classes(scans) + _skipped_findings(root, folders, scans)
    return {name: scanned.images for name, scanned in scans.items()}, findings


def _unusable_split(split: str, error: Exception) -> list[Finding]:
    locations = [Location(("." if split == UNSPLIT else split,), str(error))]
    title = "folders without labeled images"
    if split == "test":
        advice = "It was not checked. Training does not use test/."
        return finding_at("warning", "no-images", title, advice, locations)
    return finding_at("error", "no-images", title, "Training cannot start.", locations)


def _doubtful_classes(scans: Mapping[str, ScannedFolder]) -> list[Finding]:
    """Find folders that are not read as classes, and class folders that may be the parents of the true ones."""
    not_classes, nested = [], []
    for split, scanned in scans.items():
        for name, why in scanned.not_classes.items():
            not_classes.append(Location((join_split(split, name),), f"it {why}"))
        if scanned.nested and len(set(scanned.images.labels)) > 1:
            nested.append(Location((join_split(split, scanned.nested),)))
    return [
        *finding_at(
            "warning",
            "not-classes",
            "folders that are not read as classes",
            "Training does not read them either. Move them elsewhere.",
            not_classes,
        ),
        *finding_at(
            "warning",
            "nested-classes",
            "splits with all images in subfolders of the class folders",
            "If these subfolders are the classes, check and train on the folder that contains them.",
            nested,
        ),
    ]


def _split_findings(root: Path, folders: Mapping[str, Path]) -> list[Finding]:
    """Find missing splits, and folders beside the splits."""
    findings = []
    if "train" not in folders:
        advice = f"There is nothing to train on. To check val only, give the folder {root / 'val'}."
        findings += finding_at("error", "no-train", "no train/ folder", advice, [Location((".",))])
    others = folders_beside_splits(root)
    if "val" not in folders:
        other_names = [name for name in others if is_validation_name(name)]
        advice = (
            f"Training cannot start, because {other_names[0]}/ would not be read. Rename it to val."
            if other_names
            else "Training uses part of each class in train/ for validation. Create val/ to choose the images."
        )
        severity: Severity = "error" if other_names else "warning"
        findings += finding_at(severity, "no-val", "no val/ folder", advice, [Location((".",))])
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
        f"Only {', '.join(image_extensions())} are read. Convert the files, or rename those with a wrong extension.",
    ),
}


def _skipped_findings(root: Path, folders: Mapping[str, Path], scans: Mapping[str, ScannedFolder]) -> list[Finding]:
    """Find what `read_folder` skips although it may have been meant to be used."""
    paths: dict[str, list[Path]] = defaultdict(list)
    if UNSPLIT not in folders:
        paths["outside-classes"] += [
            path for path in sorted(root.iterdir()) if path.is_file() and _has_image_extension(path.name)
        ]
    for split, folder in folders.items():
        for name, path in _skipped(folder, scans[split].not_classes if split in scans else ()):
            paths[name].append(path)
    findings = []
    for name, (title, advice) in _SKIPPED.items():
        locations = [Location((path.relative_to(root).as_posix(),)) for path in paths[name]]
        findings += finding_at("warning", name, title, advice, locations)
    return findings


def _skipped(folder: Path, not_classes: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Files and folders of a split that are not read, each with the name of its finding, except in `not_classes`."""
    for directory, files in walk_visible(folder, without=not_classes):
        yield from (("hidden-folders", path) for path in _hidden_folders(Path(directory)))
        in_class = Path(directory) != folder
        for name in files:
            path = Path(directory, name)
            if name.startswith("._"):  # macOS stores file attributes there, with the same extension
                continue
            if _has_image_extension(name) and (name[0] == "." or not in_class):
                yield "hidden-files" if name[0] == "." else "outside-classes", path
            elif in_class and name[0] != "." and not _has_image_extension(name) and looks_like_image(path):
                yield "other-extensions", path


def _hidden_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] == "." and path.is_dir())


def _has_image_extension(name: str) -> bool:
    return name.lower().endswith(image_extensions())
