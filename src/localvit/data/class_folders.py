"""The classes of a folder that has one subfolder per class, and what else is in such a folder."""

from dataclasses import dataclass, field
from pathlib import Path

from localvit.data.image_files import SYSTEM_FOLDERS, FoundFiles, describe_left_out, find_images, image_extensions
from localvit.data.images import DataError, FileImages

SPLITS = ("train", "val", "test")
"""Names of the folders that contain the class folders of one split each."""
_SPLIT_NAMES = (*SPLITS, "training", "valid", "validation", "testing")
"""What people call splits, in any case."""


@dataclass(kw_only=True)
class ScannedFolder:
    """What is in a folder of class folders."""

    root: Path
    images: FileImages
    hidden: list[str] = field(default_factory=list)
    """Hidden folders, which are skipped."""
    not_classes: dict[str, str] = field(default_factory=dict)
    """Visible folders that are not classes, and why."""
    empty: list[str] = field(default_factory=list)
    """Class folders without images."""
    left_out: list[Path] = field(default_factory=list)
    """Files that seem to be images, left out because of their extension."""
    outside: list[str] = field(default_factory=list)
    """Images outside of the class folders, which are skipped."""
    nested: str | None = None
    """If no class has an image directly in its folder: a subfolder that may be the true class."""

    def warnings(self) -> list[str]:
        """A line about each thing that was skipped or may be wrong."""
        lines = [f"skipped the hidden folder {self.root / name}" for name in self.hidden]
        lines += [f"{self.root / name} is not read as a class: it {why}" for name, why in self.not_classes.items()]
        lines += [f"the class folder {self.root / name} contains no images" for name in self.empty]
        if self.left_out:
            lines.append(describe_left_out(self.left_out))
        if self.outside:
            lines.append(
                f"images directly in {self.root} are not read ({len(self.outside):,}, such as {self.outside[0]}): the "
                "class of an image is its folder"
            )
        if self.nested:
            lines.append(
                f"the images of {self.root} are all in subfolders of the class folders, such as {self.nested}: if "
                "those are the classes, give the folder that contains them"
            )
        return lines


def read_folder(root: Path, *, is_split: bool = False) -> ScannedFolder:
    """List the images of a folder that has one subfolder per class.

    Classes are the visible subfolders, sorted by name, as in torchvision's ImageFolder, except those that systems
    create, and those that contain model weights (the output of training) or only files that are not images. The images
    of a class may be in subfolders of its folder. Hidden files and folders are skipped. An empty class folder is still
    a class.

    Args:
        root: The folder.
        is_split: Whether it is the train/, val/ or test/ of a data set, where every name may be that of a class.

    Raises:
        DataError: `root` is not a folder, has no class folders, or has no images, or it has train/, validation/ or the
            like among its folders and `is_split` is False.
        OSError: A folder cannot be listed.
    """
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a folder of class folders" if root.exists() else f"no folder {root}")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    visible = [name for name in folders if not name.startswith(".")]
    if not visible:
        raise DataError(f"{root} has no class folders; create one subfolder per class and move the images there")
    found = {name: FoundFiles() if name in SYSTEM_FOLDERS else find_images(root / name) for name in visible}
    not_classes = {name: why for name, files in found.items() if (why := _why_not_class(name, files, is_split))}
    class_names = [name for name in visible if name not in not_classes]
    if not is_split:
        _refuse_splits(root, class_names)
    samples = [
        (path.relative_to(root).as_posix(), label)
        for label, name in enumerate(class_names)
        for path in found[name].images
    ]
    left_out = [path for name in class_names for path in found[name].left_out]
    if not samples:
        hints = [describe_left_out(left_out)] if left_out else []
        hints += [f"{root / name} is not read as a class: it {why}" for name, why in list(not_classes.items())[:3]]
        hint = "; ".join(hints) or f"read are {', '.join(image_extensions())}"
        raise DataError(f"{root} has no images in its subfolders; {hint}")
    extensions = image_extensions()
    return ScannedFolder(
        root=root,
        images=FileImages(root, samples, class_names),
        hidden=[name for name in folders if name.startswith(".")],
        not_classes=not_classes,
        empty=[name for name in class_names if not found[name].images],
        left_out=left_out,
        outside=sorted(
            path.name
            for path in root.iterdir()
            if path.name.lower().endswith(extensions) and not path.name.startswith(".") and not path.is_dir()
        ),
        nested=_nested_class(samples),
    )


def _why_not_class(name: str, files: FoundFiles, is_split: bool) -> str | None:
    """Why a folder is not a class, or None if it is one."""
    if name in SYSTEM_FOLDERS:
        return SYSTEM_FOLDERS[name]
    if files.weights:
        return f"contains model weights, such as {files.weights[0]}"
    if files.images or files.left_out:
        return None
    if files.num_others:
        return "contains files but no images"
    return "is empty and named like a split" if not is_split and name.lower() in _SPLIT_NAMES else None


def _refuse_splits(root: Path, class_names: list[str]) -> None:
    """Raise DataError if some of the class folders are named like splits."""
    splits = [name for name in class_names if name.lower() in _SPLIT_NAMES]
    others = [name for name in class_names if name not in splits]
    if not splits:
        return
    listed = ", ".join(f"{name}/" for name in splits)
    if not others:
        raise DataError(
            f"{root} contains {listed} instead of class folders: name the folder to train on train and the one to "
            f"evaluate on val, or give one of them, such as {root / splits[-1]}"
        )
    some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    raise DataError(
        f"{root} contains {listed} beside the class folders {some}: "
        f"move the class folders to {root / 'train'}, or move {listed} elsewhere. If a class has that name, move all "
        f"class folders to {root / 'train'}, where every folder is a class"
    )


def _nested_class(samples: list[tuple[str, int]]) -> str | None:
    """The subfolder of the first image, if no image is directly in its class folder."""
    if any(path.count("/") < 2 for path, _ in samples):
        return None
    return samples[0][0].rsplit("/", 1)[0]


def is_validation_name(name: str) -> bool:
    """Whether a folder beside train/ is named like a validation split."""
    return name.lower() in ("val", "valid", "validation")


def folders_beside_splits(root: Path) -> list[str]:
    """The visible folders beside train/, val/ and test/, which are not read."""
    return sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name not in (*SPLITS, *SYSTEM_FOLDERS)
    )
