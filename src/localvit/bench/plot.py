"""Accuracy against measured speed: the paper's first figure (arXiv 2104.05707), with measured axes."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from localvit.bench.prepare import label
from localvit.bench.result import Bench
from localvit.models.zoo import published_model
from localvit.utils.files import atomic_write

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('speeds are drawn with matplotlib: pip install "localvit[plot]"') from error

FORMATS = (".png", ".svg", ".pdf")
"""Endings of the images that can be drawn."""
_COLOR = "#0072b2"
_CAPTION_WIDTH = 105  # characters
_AREA = 12.0  # square points a million parameters


def draw_speeds(measured: Bench, image: Path) -> list[str]:
    """Draw published Acc@1 against images/s at the largest batch size into `image`; dots are as large as the models.

    Returns the names of the models left out because no accuracy is published for what was measured. Raises ValueError
    when that leaves none, or for another ending than those of FORMATS. Importing this module without matplotlib, which
    the extra `plot` brings, raises ImportError.
    """
    if image.suffix.lower() not in FORMATS:
        raise ValueError(f"{image} must end in {', '.join(FORMATS)}")
    left_out = [result.model.name for result in measured.models if result.model.acc1 is None]
    known = [(result, result.model.acc1) for result in measured.models if result.model.acc1 is not None]
    if not known:
        raise ValueError(f"there is nothing to draw: no accuracy is published for {', '.join(left_out)}")
    shown, accuracies = zip(*known, strict=True)
    options = measured.options
    batch_size = max(options.batch_sizes)
    place = options.batch_sizes.index(batch_size)
    speeds = [result.batches[place].images_per_second for result in shown]
    millions = [result.model.parameters / 1e6 for result in shown]

    # A figure of its own and not pyplot's, which would choose a window system and keep the figure alive.
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
    what = "training" if options.train else "inference"
    axes.set_xlabel(
        f"images/s: {what} in {str(options.dtype).removeprefix('torch.')}, batch size {batch_size}, "
        f"{measured.hardware['name']}"
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
    published = published_model(name)
    return published.paper_name if published else name


def _caption(left_out: Sequence[str]) -> str:
    names = ", ".join(map(label, left_out))
    told = textwrap.wrap(f"Left out, no published accuracy: {names}.", width=_CAPTION_WIDTH) if left_out else []
    return "\n".join(["Area: parameters. Bars: quartiles over rounds.", *told])
