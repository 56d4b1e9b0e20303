"""The report's building blocks, each from plain values to HTML: numbers, tables, the two charts, thumbnails."""

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from localvit.evaluation.calibration import Bin
from localvit.evaluation.per_class import ClassRow

THUMBNAIL = 96
"""Longest side of a thumbnail, in pixels."""


class Bar(float):
    """A share of 0 to 1 that a table also draws as a bar."""


Cell = str | int | float


def percent(share: float, digits: int = 1) -> str:
    """A share of 0 to 1 as percent, for HTML; one that only rounds to 0 or 100 says so."""
    if not math.isfinite(share):
        return "not finite"
    smallest = 10.0**-digits
    if 0 < 100 * share < smallest:
        return f"&lt;&nbsp;{smallest:g}&nbsp;%"
    if 100 - smallest < 100 * share < 100:
        return f"&gt;&nbsp;{100 - smallest:.{digits}f}&nbsp;%"
    return f"{100 * share:.{digits}f}&nbsp;%"


def images(count: int) -> str:
    """ "1 image", "2 images"."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def table(headings: Sequence[str], rows: Sequence[tuple[Cell, ...]]) -> str:
    """Text as it is, whole numbers, shares (floats) as percent; the first cell is the row's heading."""

    def cell(value: Cell) -> str:
        if isinstance(value, Bar):
            return f'<td class="number bar" style="--share:{value:.3f}">{percent(value)}</td>'
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        return f'<td class="number">{percent(value) if isinstance(value, float) else f"{value:,}"}</td>'

    numeric = [not isinstance(value, str) for value in rows[0]]
    head = "".join(
        f'<th scope="col"{" class=number" if right else ""}>{escape(heading)}</th>'
        for heading, right in zip(headings, numeric, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>{"".join(map(cell, row[1:]))}</tr>' for row in rows
    )
    return _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def confusion_matrix(
    names: list[str], rows: list[ClassRow], mistakes: Counter[tuple[int, int]], classes: list[int]
) -> str:
    """True classes down, predictions across, only `classes`; a last column gathers what they leave out."""

    def heading(scope: str, name: str) -> str:
        return f'<th scope="{scope}" title="{escape(name)}"><span>{escape(name)}</span></th>'

    def cell(kind: str, count: int, of: int) -> str:
        # The square root lets a small share be seen at all.
        return f'<td class="{kind}" style="--share:{math.sqrt(count / of):.3f}">{count}</td>' if count else "<td></td>"

    shown = [row for row in rows if row.index in classes]
    rest = [row.images - row.correct - sum(mistakes[row.index, column] for column in classes) for row in shown]
    head = "".join(heading("col", names[column]) for column in classes)
    if any(rest):
        head += heading("col", "any other class")
    body = ""
    for row, others in zip(shown, rest, strict=True):
        cells = "".join(
            cell("hit", row.correct, row.images)
            if column == row.index
            else cell("miss", mistakes[row.index, column], row.images)
            for column in classes
        )
        if any(rest):
            cells += cell("miss", others, row.images)
        body += f"<tr>{heading('row', row.name)}{cells}</tr>\n"
    return _scroll(f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>')


def _scroll(content: str) -> str:
    # A wide table slides inside its box, by keyboard too, and leaves the page its width.
    return f'<div class="scroll" tabindex="0" role="group" aria-label="Table">{content}</div>'


def reliability_diagram(bins: list[Bin]) -> str:
    """Accuracy by confidence, the distance between the two, and below them how many images each bar stands for."""
    left, top, width, height, floor, count_height = 46, 10, 300, 215, 282, 36
    bar = width / len(bins)
    highest = max(bin.count for bin in bins)
    shapes = []

    def text(x: float, y: float, content: str | int, anchor: str = "middle") -> None:
        shapes.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{content}</text>')

    def rectangle(kind: str, position: int, bottom: float, tall: float, title: str) -> None:
        x, y = left + position * bar + 1, bottom - tall
        shapes.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{tall:.1f}">'
            f"<title>{title}</title></rect>"
        )

    for tick in range(0, 101, 20):
        y = top + height * (1 - tick / 100)
        shapes.append(f'<path class="axis" d="M{left} {y:.0f}h{width}"/>')
        text(left - 6, y + 4, tick, "end")
        text(left + width * tick / 100, floor + 16, tick)
    for position, bin in enumerate(bins):
        if bin.count:
            title = f"{images(bin.count)}, confidence {percent(bin.confidence)}, accuracy {percent(bin.accuracy)}"
            rectangle("accuracy", position, top + height, height * bin.accuracy, title)
            rectangle("count", position, floor, max(1.0, count_height * bin.count / highest), title)
            x, middle = left + position * bar + 1, left + (position + 0.5) * bar
            said, was = (top + height * (1 - share) for share in (bin.confidence, bin.accuracy))
            shapes.append(
                f'<path class="gap" d="M{middle:.1f} {was:.1f}V{said:.1f}M{x:.1f} {said:.1f}h{bar - 2:.1f}"/>'
            )
        if bin.count == highest:
            text(left + (position + 0.5) * bar, floor - count_height - 4, f"{highest:,}")
    shapes.append(f'<path class="ideal" d="M{left} {top + height}L{left + width} {top}"/>')
    shapes.append(f'<path class="axis" d="M{left} {floor}h{width}"/>')
    text(left + width / 2, floor + 33, "confidence, %")
    shapes.append(
        f'<text transform="translate(12 {top + height / 2}) rotate(-90)" text-anchor="middle">accuracy, %</text>'
    )
    label = "Reliability diagram: accuracy and number of images by confidence; the numbers are in the table with it"
    return f'<svg viewBox="0 0 360 320" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def thumbnail(path: str, dataset_root: Path | None, *, alt: str) -> str:
    """The image inside the page, at most 96 pixels a side, or a box that says why there is none."""
    if dataset_root is None:
        return '<div class="placeholder">no image: no folder given</div>'
    jpeg = io.BytesIO()
    try:
        with Image.open(dataset_root / path) as file:
            image = file.convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(jpeg, "JPEG", quality=85)
    except FileNotFoundError:
        return '<div class="placeholder">image not found</div>'
    except Exception as error:  # whatever a decoder may raise: no number depends on this image
        return f'<div class="placeholder">image not readable ({type(error).__name__})</div>'
    data = base64.b64encode(jpeg.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}">'
