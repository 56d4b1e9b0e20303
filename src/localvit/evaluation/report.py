"""The record of an evaluation: the numbers for programs, the classes for a spreadsheet, a page for people."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from localvit.evaluation.calibration import expected_calibration_error, reliability_bins
from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.per_class import ClassRow, correct_images, per_class
from localvit.evaluation.report_page import render_page
from localvit.utils.files import atomic_write


def write_report(
    evaluation: Evaluation, directory: Path, *, dataset_root: Path | None, about: dict[str, Any]
) -> list[Path]:
    """Writes results.json, per_class.csv and report.html to `directory`, made where missing, and returns their paths.

    A file that was there is replaced whole or not at all. The page needs no other file and asks nothing of a network.

    Args:
        evaluation: at least one image.
        directory: where the files go.
        dataset_root: the folder that the evaluation's paths start from, read for the page's thumbnails; None leaves
            them out.
        about: what was evaluated and how (model, checkpoint, preprocessing, versions, device); added to results.json,
            where anything that JSON has no type for becomes text.

    Raises:
        ValueError: nothing was evaluated, or `about` holds a name that results.json gives a number of its own.
        OSError: `directory` cannot be written.
    """
    if not evaluation.paths:
        raise ValueError(
            f"no image was evaluated ({len(evaluation.skipped)} skipped), so there is nothing to report; "
            "check the data set's folder and split"
        )
    has_confidence_N = evaluation.top_probabilities_NK[:, 0].isfinite()
    bins = reliability_bins(
        evaluation.top_probabilities_NK[has_confidence_N, 0], correct_images(evaluation)[has_confidence_N]
    )
    # The rest's error would pass for the whole set's.
    ece = expected_calibration_error(bins) if has_confidence_N.all() else math.nan
    finite = evaluation.losses_N.isfinite().tolist()
    non_finite = [path for path, is_finite in zip(evaluation.paths, finite, strict=True) if not is_finite]
    rows = per_class(evaluation)

    contents = {
        "results.json": json.dumps(_results(evaluation, ece, non_finite, about), indent=2, allow_nan=False) + "\n",
        "per_class.csv": _per_class_csv(evaluation.class_names, rows),
        "report.html": render_page(evaluation, rows, bins, ece, non_finite, dataset_root, about),
    }
    for name, text in contents.items():
        with atomic_write(directory / name) as file:
            # A file name that was no UTF-8 reaches us as lone surrogates, which UTF-8 cannot hold.
            file.write_bytes(text.encode(errors="backslashreplace"))
    return [directory / name for name in contents]


def _results(evaluation: Evaluation, ece: float, non_finite: list[str], about: dict[str, Any]) -> dict[str, Any]:
    results = {
        "acc1": evaluation.acc1,
        "acc5": evaluation.acc5,
        "loss": evaluation.loss,
        "ece": ece,
        "count": len(evaluation.paths),
        "skipped": {"count": len(evaluation.skipped), "names": evaluation.skipped},
        "non_finite_loss": {"count": len(non_finite), "names": non_finite},
    }
    if taken := results.keys() & about.keys():
        raise ValueError(
            f"about holds {', '.join(sorted(taken))}, which the evaluation itself gives; leave it out of about"
        )
    return _plain({**results, **about})


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)  # tensors and numpy's numbers


def _per_class_csv(class_names: list[str], rows: list[ClassRow]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "name", "images", "correct", "accuracy", "mean_confidence", "most_common_wrong"))
    for row in rows:
        confidence = f"{row.mean_confidence:.6f}" if math.isfinite(row.mean_confidence) else ""
        wrong = "" if row.most_common_wrong is None else class_names[row.most_common_wrong]
        accuracy = f"{100 * row.accuracy:.3f}"
        writer.writerow((row.index, row.name, row.images, row.correct, accuracy, confidence, wrong))
    return text.getvalue()
