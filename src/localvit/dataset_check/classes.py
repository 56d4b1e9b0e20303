"""What the names of the classes and their numbers of images tell of trouble to come."""

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

from localvit.dataset_check.findings import Finding, Place, found
from localvit.dataset_check.splits import UNSPLIT, below

IMBALANCE = 10
"""How many times the images of a class the largest may have before it is remarked on."""

Counts = Mapping[str, Mapping[str, int]]
"""Images by split and class; a class folder without images counts 0."""


def class_findings(counts: Counts) -> list[Finding]:
    """What the names of the classes and their numbers of images tell."""
    places = [
        Place((below(split, name),))
        for split, classes in counts.items()
        for name, count in classes.items()
        if not count
    ]
    advice = (
        "A folder in train becomes an output of the model all the same, which nothing teaches. Fill or delete them."
    )
    findings = found("warning", "empty-classes", "class folders without images", advice, places)
    split = "train" if "train" in counts else UNSPLIT
    if split in counts:
        filled = {name: count for name, count in counts[split].items() if count}
        findings += _one_class(split, filled) + _unknown(counts, filled) + _unevaluated(counts, filled)
        findings += _imbalance(split, filled) + _numeric_order(sorted(counts[split]))
    return findings


def _one_class(split: str, filled: Mapping[str, int]) -> list[Finding]:
    advice = (
        "A model of one class is always right. If this folder holds the class folders, check and train on it; "
        "if not, give each class a folder."
    )
    places = [Place((below(split, name),)) for name in filled] if len(filled) == 1 else []
    return found("error", "one-class", "only one class", advice, places)


def _unknown(counts: Counts, filled: Mapping[str, int]) -> list[Finding]:
    findings = []
    advice = (
        "No model can learn them: training stops, or each of their images counts as an error. Classes go by the "
        "names of their folders, in every split. Rename the folders, or add images of these classes to train."
    )
    for split in ("val", "test"):
        places = []
        for name, count in counts.get(split, {}).items():
            if count and name not in filled:
                close = difflib.get_close_matches(name, filled, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                places.append(Place((below(split, name),), f"holds {count:,}{hint}"))
        title = f"classes of {split} that have no images in train"
        findings += found("error", "unknown-classes", title, advice, places)
    return findings


def _unevaluated(counts: Counts, filled: Mapping[str, int]) -> list[Finding]:
    if "val" not in counts:
        return []
    title = "classes of train that have no images in val"
    advice = "They are trained but not evaluated: the accuracy does not tell of them. Move some of their images to val."
    places = [Place((below("train", name),)) for name in filled if not counts["val"].get(name)]
    return found("warning", "not-in-val", title, advice, places)


def _imbalance(split: str, filled: Mapping[str, int]) -> list[Finding]:
    if not filled:
        return []
    largest = max(filled, key=filled.__getitem__)
    places = [
        Place(
            (below(split, name),),
            f"holds {filled[name]:,}, the largest {filled[largest] / filled[name]:,.0f} times as many",
        )
        for name in sorted(filled, key=filled.__getitem__)
        if filled[name] * IMBALANCE < filled[largest]
    ]
    title = f"classes with less than 1 image to {IMBALANCE} of the largest"
    advice = (
        f"The largest, {below(split, largest)}, has {filled[largest]:,}. A model seldom answers with a class that it "
        "seldom saw, and the accuracy over all images hides that. Add images, or train with class weights."
    )
    return found("warning", "imbalance", title, advice, places)


def _numeric_order(names: list[str]) -> list[Finding]:
    """Names that differ in a number alone ("10", or "class_10") and lie in another order, as text, than the numbers."""
    series = defaultdict(list)
    for index, name in enumerate(names):
        if match := re.fullmatch(r"(\D*)(\d+)(\D*)", name):
            series[match[1], match[3]].append((int(match[2]), index, name))
    places = []
    for numbered in series.values():
        for (number, index, name), (next_number, next_index, next_name) in pairwise(numbered):
            if number > next_number:
                places.append(Place((name, next_name), f"in this order, as classes {index} and {next_index}"))
                break
    title = "numbered classes that are not in the order of their numbers"
    advice = (
        "Classes are counted from 0 in the order of their names as text, so the number in a name is not the class's "
        "number among the model's outputs. localvit goes by name; what else reads the outputs may not. Fill the "
        "numbers up with zeros (002, 010), or use words."
    )
    return found("warning", "numeric-names", title, advice, places)
