"""The evaluation as one page for people: plain HTML, images inside, no script."""

import math
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from localvit.evaluation.calibration import Bin
from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.per_class import ClassRow, correct_images, count_mistakes, rank_pairs
from localvit.evaluation.report_elements import (
    Bar,
    confusion_matrix,
    images,
    percent,
    reliability_diagram,
    table,
    thumbnail,
)
from localvit.evaluation.report_template import PAGE

FULL_MATRIX = 50
"""The confusion matrix shows every class up to this many."""
PART_MATRIX = 16
"""With more classes it shows at most this many, the most confused."""
ROWS = 20
"""Rows of a table and names of a list."""
FIGURES = 12
"""Images of one kind of mistake."""


def render_page(
    evaluation: Evaluation,
    rows: list[ClassRow],
    bins: list[Bin],
    ece: float,
    non_finite: list[str],
    dataset_root: Path | None,
    about: dict[str, Any],
) -> str:
    """The whole HTML text, from the arguments of `write_report` and what it computed from them.

    `non_finite` names the images whose loss is not finite.
    """
    sections = [
        _headline(evaluation, ece),
        _warning(non_finite, "with a non-finite loss: the model's output there is infinite or not a number"),
        _warning(evaluation.skipped, "unreadable and skipped, in no number here"),
        _calibration(bins, ece),
        _mistakes(evaluation, dataset_root),
        _classes(evaluation, rows),
        _confusion(evaluation, rows),
        _about(about),
    ]
    title = f"Evaluation of {about['model']}" if about.get("model") else "Evaluation"
    return PAGE.substitute(title=escape(title), body="\n".join(filter(None, sections)))


def _headline(evaluation: Evaluation, ece: float) -> str:
    loss = f"{evaluation.loss:.3f}" if math.isfinite(evaluation.loss) else "not finite"
    classes = len(evaluation.class_names)
    top5 = (
        "true class in the best 5" if classes > 5 else f"always all with {classes} class{'' if classes == 1 else 'es'}"
    )
    cards = (
        ("Top-1 accuracy", percent(evaluation.acc1 / 100, 2), "true class is the best one"),
        ("Top-5 accuracy", percent(evaluation.acc5 / 100, 2), top5),
        ("Loss", loss, "cross-entropy, nats"),
        ("Calibration error", percent(ece, 2), "expected (ECE), 0 is best"),
        ("Images", f"{len(evaluation.paths):,}", f"{len(evaluation.skipped):,} skipped"),
    )
    items = (
        f'<div><dt>{label}</dt><dd>{value}</dd><dd class="muted">{note}</dd></div>' for label, value, note in cards
    )
    return f'<dl class="headline">{"".join(items)}</dl>'


def _warning(names: list[str], said: str) -> str:
    if not names:
        return ""
    items = "".join(f"<li>{escape(name)}</li>" for name in names[:ROWS])
    more = f"<li>and {len(names) - ROWS:,} more, all named in results.json</li>" if names[ROWS:] else ""
    return f'<div class="warning"><strong>{images(len(names))}</strong> {said}.<ul>{items}{more}</ul></div>'


def _calibration(bins: list[Bin], ece: float) -> str:
    filled = [bin for bin in bins if bin.count]
    if not filled:
        return "<section><h2>Calibration</h2><p>No image has a finite confidence.</p></section>"
    said = (
        f"On average the two are {100 * ece:.2f} percentage points apart, the expected calibration error."
        if math.isfinite(ece)
        else "Images without a finite confidence are left out, and no calibration error is given."
    )
    numbers = table(
        ("Confidence", "Images", "Mean confidence", "Accuracy"),
        [
            (f"{100 * bin.lower:.1f} to {100 * bin.upper:.1f} %", bin.count, bin.confidence, Bar(bin.accuracy))
            for bin in filled
        ],
    )
    return f"""<section><h2>Calibration</h2>
<p>Is the model right as often as it says? Images are sorted by the probability of the predicted class into
{len(bins)} equal widths. {said}</p>
<div class="side">{reliability_diagram(bins)}
<div><p><span class="key accuracy"></span> accuracy &emsp;
<span class="key gap"></span> mean confidence and its distance from the accuracy</p>
<p class="muted">On the dashed line confidence equals accuracy. Below it the model is too sure of itself, above it not
sure enough. The gray bars count the images. (arXiv 1706.04599)</p>
<details><summary>The numbers</summary>{numbers}</details></div></div></section>"""


def _mistakes(evaluation: Evaluation, dataset_root: Path | None) -> str:
    wrong_N = ~correct_images(evaluation)
    if not wrong_N.any():
        return "<section><h2>Mistakes</h2><p>None: every image's best class is the true one.</p></section>"
    text = ""
    for title, said, score_N in (
        ("Worst mistakes", "The least probability for the true class, so the highest loss.", evaluation.losses_N),
        ("Most confident mistakes", "The most probability for a wrong class.", evaluation.top_probabilities_NK[:, 0]),
    ):
        ranked_N = score_N.where(wrong_N, -math.inf)
        order_N = ranked_N.argsort(descending=True, stable=True)
        chosen = order_N[ranked_N[order_N] > -math.inf][:FIGURES].tolist()  # a NaN has no rank, and is warned of above
        if chosen:
            figures = "\n".join(_figure(evaluation, index, dataset_root) for index in chosen)
            shown = f"{len(chosen)} of {images(int(wrong_N.sum()))} predicted wrong."
            text += f'<section><h2>{title}</h2><p>{said} {shown}</p><div class="images">{figures}</div></section>\n'
    return text


def _figure(evaluation: Evaluation, index: int, dataset_root: Path | None) -> str:
    path = evaluation.paths[index]
    true = evaluation.class_names[evaluation.labels_N[index]]
    predicted = evaluation.class_names[evaluation.top_classes_NK[index, 0]]
    confidence = percent(evaluation.top_probabilities_NK[index, 0].item())
    true_probability = percent(math.exp(-evaluation.losses_N[index].item()))
    return (
        f"<figure>{thumbnail(path, dataset_root, alt=f'{true}, predicted {predicted}')}<figcaption>"
        f'<div><span class="muted">true</span> <b>{escape(true)}</b> {true_probability}</div>'
        f'<div><span class="muted">predicted</span> <b>{escape(predicted)}</b> {confidence}</div>'
        f'<div class="path muted">{escape(path)}</div></figcaption></figure>'
    )


def _classes(evaluation: Evaluation, rows: list[ClassRow]) -> str:
    names = evaluation.class_names
    weakest = sorted(rows, key=lambda row: (row.accuracy, -row.images, row.index))[:ROWS]
    cells = [
        (
            row.name,
            row.index,
            Bar(row.accuracy),
            row.correct,
            row.images,
            row.mean_confidence,
            "" if row.most_common_wrong is None else names[row.most_common_wrong],
        )
        for row in weakest
    ]
    headings = ("Class", "Index", "Accuracy", "Correct", "Images", "Mean confidence", "Most often taken for")
    missing = len(names) - len(rows)
    said = f" Classes without an image: {missing:,} of the model's {len(names):,}." if missing else ""
    title = f"The {len(weakest)} weakest of {len(rows):,} classes" if rows[ROWS:] else "Accuracy by class"
    return (
        f"<section><h2>{title}</h2><p>Lowest accuracy first; every class is in per_class.csv.{said}</p>"
        f"{table(headings, cells)}</section>"
    )


def _confusion(evaluation: Evaluation, rows: list[ClassRow]) -> str:
    names, mistakes = evaluation.class_names, count_mistakes(evaluation)
    pairs = rank_pairs(mistakes)
    text = ""
    if pairs:
        of = {row.index: row.images for row in rows}
        cells = [(names[t], names[p], mistakes[t, p], Bar(mistakes[t, p] / of[t])) for t, p in pairs[:ROWS]]
        shown = f"The {ROWS} most frequent of {len(pairs):,} pairs." if pairs[ROWS:] else "Every pair."
        pair_table = table(("True class", "Predicted", "Images", "Of the true class"), cells)
        text = f"<section><h2>Most confused pairs</h2><p>{shown}</p>{pair_table}</section>\n"

    appearing = sorted({row.index for row in rows} | {predicted for _, predicted in pairs})
    if len(appearing) <= FULL_MATRIX:
        classes, title = appearing, "Confusion matrix"
        said = "Classes without an image that were never predicted are left out." if len(classes) < len(names) else ""
    elif not pairs:
        return ""
    else:
        classes = _most_confused(mistakes)
        title = f"Confusion matrix of the {len(classes)} most confused classes"
        said = f"Only the classes of the most confused pairs, out of {len(appearing):,} with an image or a prediction."
    how = "A row is a true class with images, a column a prediction. Right is blue, wrong orange, by share of the row."
    matrix = confusion_matrix(names, rows, mistakes, classes)
    return f"{text}<section><h2>{title}</h2><p>{said} {how}</p>{matrix}</section>"


def _most_confused(mistakes: Counter[tuple[int, int]]) -> list[int]:
    both_ways: Counter[tuple[int, int]] = Counter()
    for (true, predicted), count in mistakes.items():
        both_ways[min(true, predicted), max(true, predicted)] += count
    chosen: set[int] = set()
    for pair in rank_pairs(both_ways):
        if len(chosen.union(pair)) > PART_MATRIX:
            break
        chosen.update(pair)
    return sorted(chosen)


def _about(about: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in _flat(about)
    )
    return f'<section><h2>About</h2><table class="about"><tbody>{rows}</tbody></table></section>' if rows else ""


def _flat(about: dict[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for name, value in about.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            pairs.append((f"{prefix}{name}", text))
    return pairs
