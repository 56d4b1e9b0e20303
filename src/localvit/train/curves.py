"""Images of runs, from their logs: the curves of one, and several runs beside each other."""

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
    raise ImportError('curves are drawn with matplotlib: pip install "localvit[plot]"') from error

FORMATS = (".png", ".svg", ".pdf")
"""Endings of the images that can be drawn."""
TRAIN_COLOR = "#7a8794"
VAL_COLOR = "#c0392b"
# The colors of Okabe and Ito, which every kind of color vision tells apart, without the yellow, too pale for a line.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_STYLES = [(color, line) for line, color in product(("-", "--", ":", "-."), _COLORS)]
_MARKED = 40  # epochs up to which each has its marker


def draw_curves(log: Path, image: Path, title: str = "") -> Path:
    """Draw loss and accuracy of a run by epoch into `image` (PNG, SVG or PDF by its ending), and return that path.

    Raises FileNotFoundError or ValueError for a log that is none. Importing this module without matplotlib, which the
    extra `plot` brings, raises ImportError.
    """
    rows = read_log(log)
    epochs = [row["epoch"] + 1 for row in rows]
    marker = "o" if len(rows) <= _MARKED else None

    # A figure of its own and not pyplot's, which would choose a window system and keep the figure alive.
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
    accuracy.set_title(f"best {best['test_acc1']:.2f} % (ringed), {accuracies[-1]:.2f} % at the end", fontsize=10)
    _limit_accuracy(accuracy, accuracies)
    for axes in (loss, accuracy):
        _furnish(axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return _save(figure, image)


def draw_comparison(runs: Mapping[str, Sequence[Sequence[Row]]], image: Path) -> Path:
    """Draw accuracy and training loss of several runs into `image` (PNG, SVG or PDF by its ending); returns the path.

    Args:
        runs: by the name that the legend gives them, the logs of one or several runs, which get the same line; each
            has a finished epoch. The best at the end come first in the legend.
        image: the file to write.

    Raises ValueError when there is no run, or there are more names than lines that can be told apart.
    """
    if not runs:
        raise ValueError("there is no finished epoch to draw")
    if len(runs) > len(_STYLES):
        raise ValueError(f"{len(runs)} lines cannot be told apart in one image; name {len(_STYLES)} runs at most")
    ends = {name: [rows[-1]["test_acc1"] for rows in logs] for name, logs in runs.items()}
    ranked = sorted(runs, key=lambda name: -sum(ends[name]) / len(ends[name]))
    labels = {name: f"{name}: {_range(ends[name])}" for name in runs}

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
                # A marker at the end shows where a run ends, and a run of one epoch at all.
                axes.plot(epochs, values, line, color=color, lw=1.3, marker="o", ms=4, markevery=[-1], label=label)
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
    return _save(figure, image)


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


def _save(figure: Figure, image: Path) -> Path:
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches
    if image.suffix.lower() not in FORMATS:
        raise ValueError(f"{image} must end in {', '.join(FORMATS)}")
    with atomic_write(image) as file:
        figure.savefig(file, format=image.suffix[1:].lower())
    return image
