"""Pictures of runs, from their logs: the curves of one, and several runs beside each other."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from localvit.files import written_whole
from localvit.train.files import read_log
from localvit.train.state import Row

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('curves are drawn with matplotlib: pip install "localvit[plot]"') from error

FORMATS = (".png", ".svg", ".pdf")
"""Endings of the pictures that can be drawn."""
TRAIN_COLOUR = "#7a8794"
VAL_COLOUR = "#c0392b"
# The colours of Okabe and Ito, which every kind of colour vision tells apart, without the yellow, too pale for a line.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_STYLES = [(colour, line) for line, colour in product(("-", "--", ":", "-."), _COLOURS)]
_MARKED = 40  # epochs up to which each has its marker


def draw_curves(log: Path, picture: Path, title: str = "") -> Path:
    """Draw loss and accuracy of a run by epoch into `picture` (PNG, SVG or PDF by its ending), and return that path.

    Raises FileNotFoundError or ValueError for a log that is none. Importing this module without matplotlib, which the
    extra `plot` brings, raises ImportError.
    """
    rows = read_log(log)
    epochs = [row["epoch"] + 1 for row in rows]
    marker = "o" if len(rows) <= _MARKED else None

    # A figure of its own and not pyplot's, which would choose a window system and keep the figure alive.
    figure = Figure(figsize=(9, 3.6), dpi=150)
    loss, accuracy = figure.subplots(1, 2)
    for key, label, colour, line in (
        ("train_loss", "training", TRAIN_COLOUR, "--"),
        ("test_loss", "validation", VAL_COLOUR, "-"),
    ):
        loss.plot(epochs, [row[key] for row in rows], line, color=colour, marker=marker, ms=3, label=label)
    loss.set_ylabel("loss (nats)")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)

    accuracies = [row["test_acc1"] for row in rows]
    best = max(rows, key=lambda row: row["test_acc1"])
    accuracy.plot(epochs, accuracies, color=VAL_COLOUR, marker=marker, ms=3, clip_on=False)
    accuracy.plot([best["epoch"] + 1], [best["test_acc1"]], "o", ms=7, mfc="none", color=VAL_COLOUR, clip_on=False)
    accuracy.set_ylabel("validation Acc@1 (%)")
    accuracy.set_title(f"best {best['test_acc1']:.2f} % (ringed), {accuracies[-1]:.2f} % at the end", fontsize=10)
    _limit_accuracy(accuracy, accuracies)
    for axes in (loss, accuracy):
        _furnish(axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return _save(figure, picture)


def draw_comparison(runs: Mapping[str, Sequence[Sequence[Row]]], picture: Path) -> Path:
    """Draw accuracy and training loss of several runs into `picture` (PNG, SVG or PDF by its ending); returns the path.

    Args:
        runs: by the name that the legend gives them, the logs of one or several runs, which get the same line; each
            has a finished epoch. The best at the end come first in the legend.
        picture: the file to write.

    Raises ValueError when there is no run, or there are more names than lines that can be told apart.
    """
    if not runs:
        raise ValueError("there is no finished epoch to draw")
    if len(runs) > len(_STYLES):
        raise ValueError(f"{len(runs)} lines cannot be told apart in one picture; name {len(_STYLES)} runs at most")
    ends = {name: [rows[-1]["test_acc1"] for rows in logs] for name, logs in runs.items()}
    ranked = sorted(runs, key=lambda name: -sum(ends[name]) / len(ends[name]))
    labels = {name: f"{name}: {_range(ends[name])}" for name in runs}

    ncols = max(1, min(len(runs), 110 // (max(map(len, labels.values())) + 8)))
    height = 4 + 0.22 * math.ceil(len(runs) / ncols)
    figure = Figure(figsize=(10, height), dpi=150)
    accuracy, loss = figure.subplots(1, 2)
    styles = dict(zip(runs, _STYLES, strict=False))
    for name in ranked:
        colour, line = styles[name]
        for index, rows in enumerate(runs[name]):
            epochs = [row["epoch"] + 1 for row in rows]
            for axes, key in ((accuracy, "test_acc1"), (loss, "train_loss")):
                label = labels[name] if index == 0 and axes is accuracy else None
                values = [row[key] for row in rows]
                # A marker at the end shows where a run ends, and a run of one epoch at all.
                axes.plot(epochs, values, line, color=colour, lw=1.3, marker="o", ms=4, markevery=[-1], label=label)
    accuracy.set_ylabel("validation Acc@1 (%)")
    # The steep first quarter of each run leaves no room for what sets them apart.
    late = [row["test_acc1"] for logs in runs.values() for rows in logs for row in rows[len(rows) // 4 :]]
    _limit_accuracy(accuracy, late)
    if min(rows[0]["test_acc1"] for logs in runs.values() for rows in logs) < accuracy.get_ylim()[0]:
        accuracy.set_title("the first epochs lie below", fontsize=9)
    loss.set_ylabel("training loss (nats)")
    loss.set_ylim(bottom=0)
    for axes in (accuracy, loss):
        _furnish(axes)
    figure.legend(
        loc="outside lower center", ncols=ncols, frameon=False, fontsize=9, handlelength=3, title="Acc@1 (%) at the end"
    )
    return _save(figure, picture)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if len(values) == 1 else f"{low:.2f} to {high:.2f} ({len(values)} runs)"


def _limit_accuracy(axes: Axes, values: Sequence[float]) -> None:
    """Show what there is, but never less than some points, which would make a difference out of noise."""
    low, high = min(values), max(values)
    margin = max(2.0, 0.05 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(100.0, high + margin))


def _furnish(axes: Axes) -> None:
    axes.set_xlabel("epochs trained")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec")
    axes.set_axisbelow(True)


def _save(figure: Figure, picture: Path) -> Path:
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches
    if picture.suffix.lower() not in FORMATS:
        raise ValueError(f"{picture} must end in {', '.join(FORMATS)}")
    with written_whole(picture) as file:
        figure.savefig(file, format=picture.suffix[1:].lower())
    return picture
