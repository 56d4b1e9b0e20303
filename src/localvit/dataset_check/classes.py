"""Problems with the class names and the number of images per class."""

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

from localvit.dataset_check.findings import Finding, Location, finding_at
from localvit.dataset_check.splits import UNSPLIT, join_split

IMBALANCE = 10
"""A class is reported if the largest class has more than this many times its images."""

Counts = Mapping[str, Mapping[str, int]]
"""Number of images by split and class; 0 for a class folder without images."""


def class_findings(counts: Counts) -> list[Finding]:
    """Find the problems with the class names and the number of images per class."""
    locations = [
        Location((join_split(split, name),))
        for split, classes in counts.items()
        for name, count in classes.items()
        if not count
    ]
    advice = (
        "Each class folder in train becomes an output of the model, which is never trained without images. Add images, "
        "or delete the folders."
    )
    findings = finding_at("warning", "empty-classes", "class folders without images", advice, locations)
    split = "train" if "train" in counts else UNSPLIT
    if split in counts:
        filled = {name: count for name, count in counts[split].items() if count}
        findings += _one_class(split, filled) + _none_to_hold_out(counts, split, filled)
        findings += _unknown(counts, filled) + _unevaluated(counts, filled)
        findings += _imbalance(split, filled) + _numeric_order(sorted(counts[split]))
    return findings


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _one_class(split: str, filled: Mapping[str, int]) -> list[Finding]:
    advice = (
        "A model with a single class is always right. If this folder contains the class folders, check it instead; "
        "otherwise create a folder for each class."
    )
    locations = [Location((join_split(split, name),)) for name in filled] if len(filled) == 1 else []
    return finding_at("error", "one-class", "only one class", advice, locations)


def _none_to_hold_out(counts: Counts, split: str, filled: Mapping[str, int]) -> list[Finding]:
    """Without val/, training evaluates on part of the images of each class that has several."""
    if "val" in counts or len(filled) < 2 or max(filled.values()) > 1:
        return []
    advice = (
        "Training cannot start, because it keeps images of such classes for validation. Add images, or create val/."
    )
    locations = [Location(("." if split == UNSPLIT else split,))]
    return finding_at("error", "none-to-evaluate", "folders without a class of two or more images", advice, locations)


def _unknown(counts: Counts, filled: Mapping[str, int]) -> list[Finding]:
    findings = []
    advice = (
        "The model cannot predict them: training stops, or each of their images counts as an error. Classes are "
        "matched by folder name in all splits. Rename the folders, or add images of these classes to train."
    )
    for split in ("val", "test"):
        locations = []
        for name, count in counts.get(split, {}).items():
            if count and name not in filled:
                close = difflib.get_close_matches(name, filled, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                locations.append(Location((join_split(split, name),), f"{_images(count)}{hint}"))
        title = f"classes in {split} without images in train"
        findings += finding_at("error", "unknown-classes", title, advice, locations)
    return findings


def _unevaluated(counts: Counts, filled: Mapping[str, int]) -> list[Finding]:
    if "val" not in counts:
        return []
    title = "classes in train without images in val"
    advice = (
        "They are trained but not evaluated, so the accuracy does not include them. Move some of their images to val."
    )
    locations = [Location((join_split("train", name),)) for name in filled if not counts["val"].get(name)]
    return finding_at("warning", "not-in-val", title, advice, locations)


def _imbalance(split: str, filled: Mapping[str, int]) -> list[Finding]:
    if not filled:
        return []
    largest = max(filled, key=filled.__getitem__)
    locations = [
        Location(
            (join_split(split, name),),
            f"{_images(filled[name])}; the largest class has {filled[largest] / filled[name]:,.0f} times as many",
        )
        for name in sorted(filled, key=filled.__getitem__)
        if filled[name] * IMBALANCE < filled[largest]
    ]
    title = f"classes with less than 1/{IMBALANCE} of the images of the largest"
    advice = (
        f"The largest class, {join_split(split, largest)}, has {_images(filled[largest])}. A model rarely predicts a "
        "class with few training images, and the overall accuracy hides this. Add images, or train with class weights."
    )
    return finding_at("warning", "imbalance", title, advice, locations)


def _numeric_order(names: list[str]) -> list[Finding]:
    """Numbered names ("10" or "class_10") whose alphabetical order differs from the order of their numbers."""
    series = defaultdict(list)
    for index, name in enumerate(names):
        if match := re.fullmatch(r"(\D*)(\d+)(\D*)", name):
            series[match[1], match[3]].append((int(match[2]), index, name))
    locations = []
    for numbered in series.values():
        for (number, index, name), (next_number, next_index, next_name) in pairwise(numbered):
            if number > next_number:
                locations.append(Location((name, next_name), f"they are classes {index} and {next_index}"))
                break
    title = "numbered classes that are not sorted by number"
    advice = (
        "Class indices follow the alphabetical order of the folder names, so the number in a name is not the index of "
        "the class in the model's output. localvit matches classes by name, but other programs may use the index. Pad "
        "the numbers with zeros (002, 010), or use words."
    )
    return finding_at("warning", "numeric-names", title, advice, locations)
