"""Plot accuracy against measured speed, after figure 1 of the paper (arXiv 2104.05707)."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from localvit.bench.prepare import label
from localvit.bench.result import BenchResult
from localvit.models.registry import find_model
from localvit.utils.files import atomic_write

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('plotting needs matplotlib: pip install "localvit[plot]"') from error

FORMATS = (".png", ".svg", ".pdf")
"""File name extensions of the supported image formats."""
_COLOR = "#0072b2"
_CAPTION_WIDTH = 105  # characters
_AREA = 12.0  # square points per million parameters


def draw_speeds(measured: BenchResult, image: Path) -> list[str]:
    """Plot published Acc@1 against images/s at the largest batch size; the area of a dot is the model's size.

    Importing this module needs matplotlib, which the extra `plot` installs.

    Args:
        measured: The measured models.
        image: The file to write; its extension must be one of `FORMATS`.

    Returns:
        The names of the models that were left out, because there is no published accuracy for them.

    Raises:
        ValueError: If no model is left, or for another extension.
    """
    if image.suffix.lower() not in FORMATS:
        raise ValueError(f"{image} must end in {', '.join(FORMATS)}")
    left_out = [result.model.name for result in measured.models if result.model.acc1 is None]
    known = [(result, result.model.acc1) for result in measured.models if result.model.acc1 is not None]
    if not known:
        raise ValueError(f"there is nothing to plot: no accuracy is published for {', '.join(left_out)}")
    shown, accuracies = zip(*known, strict=True)
    options = measured.options
    batch_size = max(options.batch_sizes)
    index = options.batch_sizes.index(batch_size)
    speeds = [result.batches[index].images_per_second for result in shown]
    millions = [result.model.parameters / 1e6 for result in shown]

    # Not through pyplot, which would choose a window system and keep a reference to the figure.
    figure = Figure(figsize=(7, 4.5), dpi=150)
    axes = figure.subplots()
    low = [speed.median - speed.first_quartile for speed in speeds]
    high = [speed.third_quartile - speed.median for speed in speeds]
    medians = [speed.median for speed in speeds]
    axes.errorbar(
        medians, accuracies, xerr=[low, high], fmt="none", ecolor="#333333", elinewidth=1, capsize=2, zorder=3
    )
    axes.scatter(medians, accuracies, s=[_AREA * each for each in millions], color=_COLOR, alpha=0.45, linewidths=0)
    for result, speed, accuracy, size in zip(shown, medians, accuracies, millions, strict=True):
        radius = (_AREA * size / math.pi) ** 0.5
        axes.annotate(
            f"{_short(result.model.name)}, {size:.1f} M",
            (speed, accuracy),
            xytext=(0, radius + 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.margins(x=0.18, y=0.18)
    mode = "training" if options.train else "inference"
    axes.set_xlabel(
        f"images/s ({mode} in {str(options.dtype).removeprefix('torch.')}, batch size {batch_size}, "
        f"{measured.hardware['name']})"
    )
    axes.set_ylabel("published ImageNet-1k Acc@1 (%)")
    axes.set_title(_caption(left_out), fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec")
    axes.set_axisbelow(True)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches
    with atomic_write(image) as file:
        figure.savefig(file, format=image.suffix[1:].lower())
    return left_out


def _short(name: str) -> str:
    info = find_model(name)
    return (info and info.paper_name) or name


def _caption(left_out: Sequence[str]) -> str:
    names = ", ".join(map(label, left_out))
    lines = textwrap.wrap(f"Not shown, as no accuracy is published: {names}.", width=_CAPTION_WIDTH) if left_out else []
    return "\n".join(["Area: number of parameters. Bars: quartiles over rounds.", *lines])
