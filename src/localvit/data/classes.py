"""Class names: which class of a model each class of a data set corresponds to."""

import difflib
import functools
from collections.abc import Mapping, Sequence
from importlib import resources

from timm.data import ImageNetInfo
from torch import nn

from localvit.data.images import DataError, Images

IMAGENET_SUBSETS = {"IMNET-A": "imagenet_a_synsets.txt", "IMNET-R": "imagenet_r_synsets.txt"}
"""The 200-class sets that are scored on their own classes only (ImageNet-A, arXiv 1907.07174; ImageNet-R, arXiv
2006.16241), and the files in which timm lists their classes."""


@functools.cache
def imagenet_synsets() -> list[str]:
    """WordNet synsets of ImageNet-1k, in the order of its class indices (timm's list)."""
    return list(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def imagenet_words() -> list[str]:
    """Readable names of ImageNet-1k's classes, in the order of its class indices (timm's list)."""
    return list(ImageNetInfo("imagenet-1k").label_descriptions())


def subset_classes(name: str) -> list[int]:
    """ImageNet-1k indices of the classes of ImageNet-A or -R, from the lists bundled with timm."""
    text = resources.files("timm.data").joinpath("_info", IMAGENET_SUBSETS[name]).read_text()
    index_of = {synset: index for index, synset in enumerate(imagenet_synsets())}
    return sorted(index_of[synset] for synset in text.split())


def model_class_names(model: nn.Module, class_names: Sequence[str] | None) -> list[str] | None:
    """Names of a model's classes: the given ones, else those of its pretrained weights, else None.

    Pretrained weights name theirs in timm's `pretrained_cfg["label_names"]`. 1,000 classes without names are ImageNet's
    synsets.
    """
    if class_names is not None:
        return list(class_names)
    num_classes = getattr(model, "num_classes", None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    named = cfg.get("label_names") if isinstance(cfg, Mapping) else None
    if isinstance(named, (list, tuple)) and len(named) == num_classes:
        return list(named)
    return imagenet_synsets() if num_classes == 1000 else None


def readable_class_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Class names to show to a person: words for ImageNet's synsets, numbers for classes without names."""
    if class_names is None:
        return [str(index) for index in range(num_classes)]
    return imagenet_words() if list(class_names) == imagenet_synsets() else list(class_names)


def match_classes(images: Images, model_names: Sequence[str] | None, num_classes: int) -> list[int]:
    """For each class of a data set, find the model's class of the same name.

    Classes are matched by position instead if either side has no class names, or if the data set defines its own class
    order under other names; the number of classes must then be equal. Classes without images need no match.

    Args:
        images: The data set.
        model_names: Names of the model's classes, or None.
        num_classes: Number of the model's classes.

    Returns:
        The model's class index for each class of the data set; -1 for a class without images that the model lacks.

    Raises:
        DataError: The data set has classes that the model lacks. The message names the first few.
    """
    data_names = images.class_names
    if data_names is None:
        for index, label in enumerate(images.labels):
            check_label(images.name(index), label, num_classes)
        return list(range(num_classes))
    if model_names is None:
        _check_number(data_names, num_classes)
        return list(range(num_classes))
    index_of = {name: index for index, name in enumerate(model_names)}
    used = set(images.labels)
    unknown = [name for label, name in enumerate(data_names) if label in used and name not in index_of]
    if unknown and images.fixed_order and len(data_names) == num_classes:
        return list(range(num_classes))
    if unknown:
        close = difflib.get_close_matches(unknown[0], model_names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        kind = "ImageNet-1k synsets" if list(model_names) == imagenet_synsets() else "classes of the model"
        raise DataError(
            f"{len(unknown)} of the data set's {len(data_names)} classes are not {kind}: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}{hint}; "
            "labels are matched by folder name, so rename the folders, or use a checkpoint that was trained on these "
            "classes"
        )
    return [index_of.get(name, -1) for name in data_names]


def match_streamed_classes(
    data_names: Sequence[str] | None, model_names: Sequence[str] | None, num_classes: int
) -> list[int]:
    """`match_classes` for a stream, of which it is not known which classes have images.

    So a class that the model lacks is -1, and an image of it must be refused when it comes. Classes are matched by
    position where `match_classes` would, and if no class of the data set has a name of the model's.

    Raises:
        DataError: No class of the data set is the model's.
    """
    if data_names is None:
        return list(range(num_classes))
    if model_names is None:
        _check_number(data_names, num_classes)
        return list(range(num_classes))
    index_of = {name: index for index, name in enumerate(model_names)}
    if not any(name in index_of for name in data_names):
        if len(data_names) == num_classes:
            return list(range(num_classes))
        raise DataError(
            f"none of the data set's {len(data_names)} classes ({', '.join(map(repr, data_names[:5]))}"
            f"{', ...' if len(data_names) > 5 else ''}) is one of the model's; use a checkpoint that was trained on "
            "these classes"
        )
    return [index_of.get(name, -1) for name in data_names]


def check_label(image: str, label: int, num_classes: int) -> None:
    """Raise DataError, with the image's name, unless a label without a name is the index of a class of the model."""
    if not 0 <= label < num_classes:
        raise DataError(f"{image} has the label {label}, and the model has the classes 0 to {num_classes - 1}")


def _check_number(data_names: Sequence[str], num_classes: int) -> None:
    """Raise DataError unless classes can be matched by position."""
    if len(data_names) != num_classes:
        raise DataError(
            f"the data set has {len(data_names)} classes, the model {num_classes}, and the checkpoint has no class "
            "names to match them by; use a checkpoint that was trained on these classes"
        )
