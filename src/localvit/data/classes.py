"""Labels go by class name: which class of the model each class of a data set is."""

import difflib
import functools
from collections.abc import Sequence
from importlib import resources

from timm.data import ImageNetInfo
from torch import nn

from localvit.data.images import DataError, Images

IMAGENET_SUBSETS = {"IMNET-A": "imagenet_a_synsets.txt", "IMNET-R": "imagenet_r_synsets.txt"}
"""The 200-class sets that are scored on their own classes (ImageNet-A, arXiv 1907.07174; ImageNet-R, 2006.16241)."""


@functools.cache
def imagenet_synsets() -> list[str]:
    """WordNet synsets of ImageNet-1k in the order of its class indices (timm's list)."""
    return list(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def imagenet_words() -> list[str]:
    """Words for ImageNet-1k's classes, in the order of its class indices (timm's list)."""
    return list(ImageNetInfo("imagenet-1k").label_descriptions())


def subset_classes(name: str) -> list[int]:
    """ImageNet-1k indices of the classes of ImageNet-A or -R, from the lists that timm bundles."""
    text = resources.files("timm.data").joinpath("_info", IMAGENET_SUBSETS[name]).read_text()
    index_of = {synset: index for index, synset in enumerate(imagenet_synsets())}
    return sorted(index_of[synset] for synset in text.split())


def model_class_names(model: nn.Module, class_names: Sequence[str] | None) -> list[str] | None:
    """The names that the model's classes go by: its checkpoint's, ImageNet's synsets for 1,000, else unknown."""
    if class_names is not None:
        return list(class_names)
    return imagenet_synsets() if getattr(model, "num_classes", None) == 1000 else None


def match_classes(images: Images, model_names: Sequence[str] | None, num_classes: int) -> list[int]:
    """For each class of the data set, the model's class of that name.

    Where either side knows no names, or the data set numbers its classes itself under other names, classes are matched
    by position, if there are as many of them.

    Raises DataError, naming the first few classes, when the data set has classes that the model lacks.
    """
    data_names = images.class_names
    if data_names is None:
        return list(range(num_classes))
    if model_names is None:
        if len(data_names) != num_classes:
            raise DataError(
                f"the data set has {len(data_names)} classes, the model {num_classes}, and the checkpoint has no class "
                "names to match them by; use a checkpoint that was trained on these classes"
            )
        return list(range(num_classes))
    index_of = {name: index for index, name in enumerate(model_names)}
    unknown = [name for name in data_names if name not in index_of]
    if unknown and images.fixed_order and len(data_names) == num_classes:
        return list(range(num_classes))
    if unknown:
        close = difflib.get_close_matches(unknown[0], model_names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        kind = "ImageNet-1k synset" if list(model_names) == imagenet_synsets() else "class of the model"
        raise DataError(
            f"{len(unknown)} of the data set's {len(data_names)} classes are no {kind}: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}{hint}; "
            "labels go by folder name, so rename the folders or use a checkpoint that was trained on these classes"
        )
    return [index_of[name] for name in data_names]
