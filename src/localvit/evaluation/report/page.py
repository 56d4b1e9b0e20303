"""The values that report.html shows. The templates in this folder contain the text, layout and style."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.metrics import Bin, ClassMetrics, count_mistakes, rank_pairs
from localvit.evaluation.report.mistakes import ExplainedImage, list_mistakes
from localvit.evaluation.temperature import Effect
from localvit.inference.calibration import Calibration

FULL_MATRIX = 50
"""The confusion matrix shows all classes up to this number."""
PART_MATRIX = 16
"""With more classes, it shows the most confused ones, at most this many."""
FEW = 5
"""As many classes without a correct image, and pairs that occur once, have a row each; more do not."""
IMAGES_PER_CLASS = 3
"""With fewer images than this for each of many classes, the matrix would be nearly empty, so it shows a part."""
MAX_ROWS = 20
"""Rows of a table and names in a list."""


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """A true class and a wrong prediction."""

    true: str
    predicted: str
    count: int
    share: float
    """Share of the true class's images, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a confusion matrix."""

    count: int
    correct: bool
    shade: float
    """0 to 1."""


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """The predictions for one true class."""

    name: str
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """A confusion matrix of some classes."""

    names: list[str]
    """The classes, in the order of the columns."""
    rows: list[MatrixRow]
    """Those of the classes that have images."""
    has_rest: bool
    """Whether the last cell of each row counts the predictions of all other classes."""
    is_part: bool
    """Whether classes that appear were left out."""
    num_appearing: int
    """Number of classes that have images or were predicted."""


def render_page(
    evaluation: Evaluation,
    classes: list[ClassMetrics],
    bins: list[Bin],
    ece: float,
    non_finite: list[str],
    dataset_root: Path | None,
    about: dict[str, Any],
    calibrated: tuple[Calibration, Effect] | None = None,
    explained: Mapping[int, ExplainedImage] | None = None,
) -> str:
    """Render report.html.

    Args:
        evaluation: The evaluation.
        classes: Its result for each class.
        bins: Its reliability diagram.
        ece: Its calibration error, or NaN.
        non_finite: Names of the images whose loss is not finite.
        dataset_root: Folder of the images, for thumbnails, or None.
        about: What was evaluated and how.
        calibrated: The model's temperature and what it does to these probabilities.
        explained: What the model looks at in the images at some positions of the evaluation.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("localvit.evaluation.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "decimal": decimal, "plural": plural}
    mistakes = count_mistakes(evaluation)
    pairs = rank_pairs(mistakes)
    without_hits = _classes_without_hits(classes)
    weakest = _weakest([row for row in classes if row not in without_hits])
    return environment.get_template("report.html.jinja").render(
        title=f"Evaluation of {about['model']}" if about.get("model") else "Evaluation",
        evaluation=evaluation,
        num_images=len(evaluation.paths),
        class_names=evaluation.class_names,
        num_classes=len(evaluation.class_names),
        num_classes_with_images=len(classes),
        max_rows=MAX_ROWS,
        ece=ece,
        bins=bins,
        filled_bins=[bin for bin in bins if bin.count],
        calibration=calibrated[0] if calibrated else None,
        effect=calibrated[1] if calibrated else None,
        non_finite=non_finite,
        num_wrong=mistakes.total(),
        mistakes=list_mistakes(evaluation, dataset_root, explained or {}),
        is_explained=bool(explained),
        weakest=weakest,
        without_hits=[row.name for row in without_hits],
        most_without_hits=max((row.images for row in without_hits), default=0),
        num_pairs=len(pairs),
        pairs=_confused_pairs(evaluation.class_names, classes, mistakes)[:MAX_ROWS],
        only_single_pairs=len(pairs) > FEW and mistakes[pairs[0]] == 1,  # the list of mistakes shows them all
        matrix=_confusion_matrix(evaluation.class_names, classes, mistakes),
        about=_flatten(about),
    )


def _classes_without_hits(classes: list[ClassMetrics]) -> list[ClassMetrics]:
    """The classes without a correctly classified image, if they are so many that a row for each says nothing."""
    found = [row for row in classes if not row.correct]
    return found if len(found) > FEW else []


def _weakest(classes: list[ClassMetrics]) -> list[ClassMetrics]:
    """The classes of lowest accuracy; none if each has a single image, whose class is then right."""
    if classes and all(row.images == row.correct == 1 for row in classes):
        return []
    return sorted(classes, key=lambda row: (row.accuracy, -row.images, row.index))[:MAX_ROWS]


def percent(share: float, digits: int = 1) -> str:
    """A share of 0 to 1 as percent. Values that would only be rounded to 0 or 100 are marked with < or >."""
    if not math.isfinite(share):
        return "not finite"
    smallest = 10.0**-digits
    if 0 < 100 * share < smallest:
        return f"<\xa0{smallest:g}\xa0%"
    if 100 - smallest < 100 * share < 100:
        return f">\xa0{100 - smallest:.{digits}f}\xa0%"
    return f"{100 * share:.{digits}f}\xa0%"


def decimal(value: float, digits: int) -> str:
    """A number with a fixed number of decimals."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def plural(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _confused_pairs(
    names: list[str], classes: list[ClassMetrics], mistakes: Counter[tuple[int, int]]
) -> list[ConfusedPair]:
    num_images = {row.index: row.images for row in classes}
    return [
        ConfusedPair(
            true=names[true],
            predicted=names[predicted],
            count=mistakes[true, predicted],
            share=mistakes[true, predicted] / num_images[true],
        )
        for true, predicted in rank_pairs(mistakes)
    ]


def _confusion_matrix(
    names: list[str], classes: list[ClassMetrics], mistakes: Counter[tuple[int, int]]
) -> ConfusionMatrix | None:
    """The matrix of all classes that appear; of many, of the most confused ones, or None if no
    two classes are confused twice."""
    appearing = sorted({row.index for row in classes} | {predicted for _, predicted in mistakes})
    is_sparse = sum(row.images for row in classes) < IMAGES_PER_CLASS * len(appearing)
    is_part = len(appearing) > (PART_MATRIX if is_sparse else FULL_MATRIX)
    if is_part and max(mistakes.values(), default=0) <= 1:
        return None
    shown = _most_confused(mistakes) if is_part else appearing
    rows = [row for row in classes if row.index in shown]
    others = {predicted for _, predicted in mistakes}.difference(shown)
    rest = [sum(mistakes[row.index, column] for column in others) for row in rows]
    has_rest = any(rest)
    matrix_rows = []
    for row, elsewhere in zip(rows, rest, strict=True):
        counts = [(row.correct if column == row.index else mistakes[row.index, column], column) for column in shown]
        counts += [(elsewhere, -1)] if has_rest else []
        # The square root makes small shares visible.
        cells = [
            Cell(count=count, correct=column == row.index, shade=math.sqrt(count / row.images))
            for count, column in counts
        ]
        matrix_rows.append(MatrixRow(name=row.name, cells=cells))
    return ConfusionMatrix(
        names=[names[column] for column in shown],
        rows=matrix_rows,
        has_rest=has_rest,
        is_part=is_part,
        num_appearing=len(appearing),
    )


def _most_confused(mistakes: Counter[tuple[int, int]]) -> list[int]:
    both_ways: Counter[tuple[int, int]] = Counter()
    for (true, predicted), number in mistakes.items():
        both_ways[min(true, predicted), max(true, predicted)] += number
    chosen: set[int] = set()
    for pair in rank_pairs(both_ways):
        if len(chosen.union(pair)) > PART_MATRIX:
            break
        chosen.update(pair)
    return sorted(chosen)


def _flatten(about: dict[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of name and text."""
    rows = []
    for name, value in about.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{name} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((f"{prefix}{name}", text))
    return rows
