"""Writing what locality does: the figure locality.png, the numbers in locality.json, and both in explain.html."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localvit.explanations.files import PAGE
from localvit.explanations.measures import Field, LocalityMeasures
from localvit.explanations.measures_page import render_measures
from localvit.explanations.overlay import short_name
from localvit.utils.files import atomic_write

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('drawing what locality does needs matplotlib: pip install "localvit[plot]"') from error

FIGURE, NUMBERS = "locality.png", "locality.json"
"""The names of the files."""
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
MAX_MODELS = len(_COLORS)
"""Models that one figure can show."""
MAX_COLUMNS = 12
"""Blocks whose fields are shown; of a deeper model, so many at equal steps, the last included."""
_DARKEST = 1e-4
"""Squared gradients are shown on a logarithmic scale from this part of the highest one."""


def write_measures(models: Sequence[LocalityMeasures], directory: Path) -> list[Path]:
    """Write the figure of one or several models, all numbers, and a page of both, each atomically.

    The page is self-contained: it needs no other file and no network.

    Importing this module needs matplotlib, which the extra `plot` installs.

    Returns:
        The paths of the three files.

    Raises:
        ValueError: for no or too many models.
        OSError: `directory` cannot be written to.
    """
    if not 1 <= len(models) <= MAX_MODELS:
        raise ValueError(f"one figure shows 1 to {MAX_MODELS} models, not {len(models)}")
    figure = io.BytesIO()
    draw_measures(models).savefig(figure, format="png")
    numbers = json.dumps([_numbers(model) for model in models], indent=2) + "\n"
    page = render_measures(models, figure.getvalue())
    contents = {
        FIGURE: figure.getvalue(),
        NUMBERS: numbers.encode(errors="backslashreplace"),
        PAGE: page.encode(errors="backslashreplace"),
    }
    for name, content in contents.items():
        with atomic_write(directory / name) as file:
            file.write_bytes(content)
    return [directory / name for name in contents]


def draw_measures(models: Sequence[LocalityMeasures]) -> Figure:
    """Attention distance, accuracy without neighbors, and the receptive fields of each block."""
    rows = [row for model in models for row in _field_rows(model)]
    height = 1.62 * len(rows) + 0.3
    figure = Figure(figsize=(9.5, 3.3 + height), dpi=110)  # not through pyplot, which keeps a reference
    figure.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.3, height])
    measured = any(model.accuracies for model in models)
    axes = parts[0].subplots(1, 2 if measured else 1, squeeze=False)[0]
    _draw_reaches(axes[0], models)
    if measured:
        _draw_accuracies(axes[1], models)
    _draw_fields(parts[1], rows)
    return figure


def _draw_reaches(axes: Axes, models: Sequence[LocalityMeasures]) -> None:
    for number, (model, color) in enumerate(zip(models, _COLORS, strict=False)):
        positions = np.arange(1, len(model.reaches) + 1) + 0.12 * (number - (len(models) - 1) / 2)
        for position, reach in zip(positions, model.reaches, strict=True):
            axes.scatter([position] * len(reach.pixels), reach.pixels, s=16, color=color, alpha=0.55, linewidths=0)
        means = [float(np.mean(reach.pixels)) for reach in model.reaches]
        axes.plot(positions, means, color=color, lw=1.4, label=_literal(model.name))
    longest = max(models, key=lambda model: len(model.reaches))
    uniform = [reach.uniform for reach in longest.reaches]
    axes.plot(range(1, len(uniform) + 1), uniform, color="#888888", ls="--", lw=1, label="equal attention")
    axes.margins(y=0.25)
    axes.set_xlabel("attention layer")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.set_title("How far attention reaches (dots: heads)", fontsize=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(fontsize=8, frameon=False)
    _style(axes)


def _draw_accuracies(axes: Axes, models: Sequence[LocalityMeasures]) -> None:
    """Bars for models with locality, a line for each other one."""
    colored = list(zip(models, _COLORS, strict=False))
    local = [(model, color) for model, color in colored if model.accuracies and model.local_layers]
    for model, color in colored:
        if model.accuracies and not model.local_layers:
            value = 100 * model.accuracies[0].correct / model.num_images
            axes.axhline(value, color=color, ls="--", lw=1.2, label=f"{_literal(model.name)} {value:.1f}")
    width = 0.8 / max(len(local), 1)
    for number, (model, color) in enumerate(local):
        values = [100 * each.correct / model.num_images for each in model.accuracies]
        offset = (number - (len(local) - 1) / 2) * width
        bars = axes.bar([index + offset for index in range(len(values))], values, width, color=color, alpha=0.85)
        size = 7.5 if len(local) == 1 else 5
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}  # the lines pass there
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=size, padding=2, bbox=behind)
    if local:
        deepest = max((model.accuracies for model, _ in local), key=len)
        labels = [_without(each.without) for each in deepest]
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set_xlabel("neighbors set to zero in block")
    else:
        axes.set_xticks([])
    if len(local) < len(models):
        axes.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 1.03), ncols=2)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("Acc@1 (%)")
    axes.set_title(f"Accuracy on {max(model.num_images for model in models):,} images", fontsize=10, loc="left")
    _style(axes)


def _draw_fields(figure: SubFigure, rows: Sequence[tuple[str, Sequence[Field]]]) -> None:
    grid = figure.subplots(len(rows), max(len(fields) for _, fields in rows), squeeze=False)
    for number, (name, fields) in enumerate(rows):
        for axes in grid[number]:
            axes.set_axis_off()
        for axes, field in zip(grid[number], fields, strict=False):
            squared = field.squared_HW.double().numpy()
            axes.imshow(np.log10(squared / squared.max() + 1e-30), cmap="inferno", vmin=np.log10(_DARKEST), vmax=0)
            block = f"{short_name(field.block)}: " if number == 0 or len(fields) != len(rows[0][1]) else ""
            axes.set_title(f"{block}{100 * (1 - field.share_center):.0f} %", fontsize=8)
        first = grid[number][0]
        first.text(
            -0.08, 0.5, _literal(name), transform=first.transAxes, rotation=90, ha="right", va="center", fontsize=7.5
        )
    figure.suptitle(
        "What the center patch reads of the image after each block: squared gradient, on a logarithmic scale down to\n"
        "1/10,000 of the highest. Above each: its share outside the center patch.",
        fontsize=9,
        x=0.01,
        ha="left",
    )


def _field_rows(model: LocalityMeasures) -> list[tuple[str, list[Field]]]:
    rows = [(model.name, _some(model.fields))]
    if model.fields_without:
        rows.append(("without neighbors", _some(model.fields_without)))
    return rows


def _some(fields: Sequence[Field]) -> list[Field]:
    if len(fields) <= MAX_COLUMNS:
        return list(fields)
    steps = np.linspace(len(fields) / MAX_COLUMNS, len(fields), MAX_COLUMNS).round().astype(int) - 1
    return [fields[index] for index in steps]


def _without(layers: Sequence[str]) -> str:
    if not layers:
        return "none"
    if len(layers) > 1:
        return "all"
    return short_name(layers[0]).replace("block ", "").replace("stage ", "").replace(" ", ".")


def _literal(text: str) -> str:
    """Text without what matplotlib would take for mathematics."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text).replace(
        "$", r"\$"
    )


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec")
    axes.set_axisbelow(True)


def _numbers(model: LocalityMeasures) -> dict[str, Any]:
    def fields(found: Sequence[Field]) -> list[dict[str, Any]]:
        return [
            {
                "block": each.block,
                "distance": round(each.distance, 4),
                "share_center": round(each.share_center, 4),
                "share_3x3": round(each.share_3x3, 4),
            }
            for each in found
        ]

    return {
        "model": model.name,
        "image_size": list(model.image_size),
        "probe_images": model.num_probes,
        "attention_distance": [
            {
                "layer": each.layer,
                "pixels": [round(value, 4) for value in each.pixels],
                "equal_attention": round(each.uniform, 4),
            }
            for each in model.reaches
        ],
        "receptive_field": fields(model.fields),
        "receptive_field_without_neighbors": fields(model.fields_without),
        "images": model.num_images,
        "accuracy": [
            {
                "without": list(each.without),
                "correct": each.correct,
                "acc1": round(100 * each.correct / model.num_images, 3),
                "change": round(100 * each.change, 3),
                "standard_error": round(100 * each.standard_error, 3),
            }
            for each in model.accuracies
        ],
    }
