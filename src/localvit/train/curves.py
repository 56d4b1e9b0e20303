"""Plots of runs from their logs: the curves of one run, and a comparison of several."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from localvit.train.run_folder import read_log
from localvit.train.state import Row
from localvit.utils.files import atomic_write

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('plotting curves needs matplotlib: pip install "localvit[plot]"') from error

FORMATS = (".png", ".svg", ".pdf")
"""Supported file formats."""
TRAIN_COLOR = "#7a8794"
VAL_COLOR = "#c0392b"
# The color-blind safe palette of Okabe and Ito, without yellow, which is too pale for lines.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_STYLES = [(color, line) for line, color in product(("-", "--", ":", "-."), _COLORS)]
_MAX_MARKERS = 40  # with more epochs, lines have no markers


def draw_curves(log: Path, image: Path, title: str = "") -> Path:
    """Plot loss and accuracy of a run by epoch (from 1), and return the path of the image.

    Importing this module without matplotlib (the extra `plot`) raises ImportError.

    Args:
        log: the run's log.txt.
        image: the file to write; its suffix determines the format (PNG, SVG or PDF).
        title: title of the figure.

    Raises:
        FileNotFoundError, ValueError: if the log does not exist or is not a log.
    """
    rows = read_log(log)
    epochs = [row["epoch"] + 1 for row in rows]
    marker = "o" if len(rows) <= _MAX_MARKERS else None

    # pyplot would select a window system and keep a reference to the figure.
    figure = Figure(figsize=(9, 3.6), dpi=150)
    loss, accuracy = figure.subplots(1, 2)
    for key, label, color, line in (
        ("train_loss", "training", TRAIN_COLOR, "--"),
        ("test_loss", "validation", VAL_COLOR, "-"),
    ):
        loss.plot(epochs, [row[key] for row in rows], line, color=color, marker=marker, ms=3, label=label)
    loss.set_ylabel("loss (nats)")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)

    accuracies = [row["test_acc1"] for row in rows]
    best = max(rows, key=lambda row: row["test_acc1"])
    accuracy.plot(epochs, accuracies, color=VAL_COLOR, marker=marker, ms=3, clip_on=False)
    accuracy.plot([best["epoch"] + 1], [best["test_acc1"]], "o", ms=7, mfc="none", color=VAL_COLOR, clip_on=False)
    accuracy.set_ylabel("validation Acc@1 (%)")
    accuracy.set_title(f"best {best['test_acc1']:.2f} % (circled), {accuracies[-1]:.2f} % at the end", fontsize=10)
    _limit_accuracy(accuracy, accuracies)
    for axes in (loss, accuracy):
        _style(axes)
    if title:
        figure.suptitle(literal_text(title), fontsize=11)
    return _save(figure, image)


def draw_comparison(runs: Mapping[str, Sequence[Sequence[Row]]], image: Path) -> Path:
    """Plot accuracy and training loss of several runs by epoch (from 1), and return the path of the image.

    Args:
        runs: by name for the legend, the logs of one or several runs that share a line style. Each log has at least
            one epoch. The legend is sorted by the final accuracy.
        image: the file to write; its suffix determines the format (PNG, SVG or PDF).

    Raises:
        ValueError: if there is no run, or there are more names than line styles.
    """
    check_number_of_lines(len(runs))
    ends = {name: [rows[-1]["test_acc1"] for rows in logs] for name, logs in runs.items()}
    ranked = sorted(runs, key=lambda name: -sum(ends[name]) / len(ends[name]))
    labels = {name: literal_text(f"{name}: {_range(ends[name])}") for name in runs}

    ncols = max(1, min(len(runs), 110 // (max(map(len, labels.values())) + 8)))
    height = 4 + 0.22 * math.ceil(len(runs) / ncols)
    figure = Figure(figsize=(10, height), dpi=150)
    accuracy, loss = figure.subplots(1, 2)
    styles = dict(zip(runs, _STYLES, strict=False))
    for name in ranked:
        color, line = styles[name]
        for index, rows in enumerate(runs[name]):
            epochs = [row["epoch"] + 1 for row in rows]
            for axes, key in ((accuracy, "test_acc1"), (loss, "train_loss")):
                label = labels[name] if index == 0 and axes is accuracy else None
                values = [row[key] for row in rows]
                # The marker at the end makes runs of one epoch visible.
                axes.plot(epochs, values, line, color=color, lw=1.3, marker="o", ms=4, markevery=[-1], label=label)
    accuracy.set_ylabel("validation Acc@1 (%)")
    # Without the steep first quarter of each run, differences between the runs are visible.
    late = [row["test_acc1"] for logs in runs.values() for rows in logs for row in rows[len(rows) // 4 :]]
    _limit_accuracy(accuracy, late)
    if min(rows[0]["test_acc1"] for logs in runs.values() for rows in logs) < accuracy.get_ylim()[0]:
        accuracy.set_title("the first epochs are below this range", fontsize=9)
    loss.set_ylabel("training loss (nats)")
    loss.set_ylim(bottom=0)
    for axes in (accuracy, loss):
        _style(axes)
    figure.legend(
        loc="outside lower center", ncols=ncols, frameon=False, fontsize=9, handlelength=3, title="Acc@1 (%) at the end"
    )
    return _save(figure, image)


def draw_study(
    by_epoch: Mapping[str, Sequence[Sequence[float]]], at_end: Mapping[str, Sequence[tuple[int, float]]], image: Path
) -> Path:
    """Plot the arms of a study, and return the path of the image.

    The ends of schedules have a panel of their own, unless there is only one.

    Args:
        by_epoch: by arm, for each seed the accuracy after each epoch of the longest schedule, in percent.
        at_end: by arm, length of the schedule in epochs and accuracy at its end, for each run.
        image: the file to write; its suffix determines the format (PNG, SVG or PDF).

    Raises:
        ValueError: if there are more arms than line styles.
    """
    check_number_of_lines(len(by_epoch))
    has_ends = len({length for runs in at_end.values() for length, _ in runs}) > 1
    size = (10 if has_ends else 6.5, 4 + 0.22 * math.ceil(len(by_epoch) / 4))
    figure = Figure(figsize=size, dpi=150)
    left, *ends = figure.subplots(1, 2 if has_ends else 1, sharey=True, squeeze=False)[0]
    for (arm, curves), (color, line) in zip(by_epoch.items(), _STYLES, strict=False):
        for number, values in enumerate(curves):
            epochs = range(1, len(values) + 1)
            label = literal_text(arm) if number == 0 else None
            left.plot(epochs, values, line, color=color, lw=1.3, marker="o", ms=4, markevery=[-1], label=label)
        for right in ends:
            lengths = sorted({length for length, _ in at_end[arm]})
            accuracies = [[acc1 for length, acc1 in at_end[arm] if length == each] for each in lengths]
            right.plot(lengths, [sum(each) / len(each) for each in accuracies], line, color=color, lw=1.3)
            right.plot([each[0] for each in at_end[arm]], [each[1] for each in at_end[arm]], "o", color=color, ms=4)
    left.set_title("longest schedule, a line for each seed" if has_ends else "a line for each seed", fontsize=10)
    left.set_ylabel("validation Acc@1 (%)")
    left.set_xlabel("epoch")
    _style(left)
    for right in ends:
        right.set_title("end of each schedule, a dot for each seed", fontsize=10)
        right.set_xlabel("epochs of the schedule")
        _style(right)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, handlelength=3)
    return _save(figure, image)


def literal_text(text: str) -> str:
    """`text` for matplotlib to draw as it is: no mathematics between dollar signs, no label hidden by an underscore,
    and control characters and invalid UTF-8 escaped."""
    escaped = (
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    literal = "".join(escaped).replace("$", r"\$")
    return f" {literal}" if literal.startswith("_") else literal


def check_number_of_lines(number: int) -> None:
    """Raise ValueError if `draw_comparison` cannot show so many lines."""
    if not number:
        raise ValueError("there is no finished epoch to plot")
    if number > len(_STYLES):
        raise ValueError(f"one plot shows at most {len(_STYLES)} lines, not {number}; name fewer runs")


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if len(values) == 1 else f"{low:.2f} to {high:.2f} ({len(values)} runs)"


def _limit_accuracy(axes: Axes, values: Sequence[float]) -> None:
    """Limit the axis to the values, but to at least 4 points, so that noise does not look like a difference."""
    low, high = min(values), max(values)
    margin = max(2.0, 0.05 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(100.0, high + margin))


def _style(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec")
    axes.set_axisbelow(True)


def _save(figure: Figure, image: Path) -> Path:
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches
    if image.suffix.lower() not in FORMATS:
        raise ValueError(f"{image} must end in {', '.join(FORMATS)}")
    with atomic_write(image) as file:
        figure.savefig(file, format=image.suffix[1:].lower())
    return image
