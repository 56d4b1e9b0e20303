"""Writing the files of a report."""

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.metrics import (
    ClassMetrics,
    expected_calibration_error,
    per_class,
    reliability,
)
from localvit.evaluation.report.mistakes import ExplainedImage
from localvit.evaluation.report.page import render_page
from localvit.evaluation.temperature import Effect
from localvit.inference.calibration import Calibration
from localvit.utils.files import atomic_write

FILES = ("results.json", "per_class.csv", "report.html")
"""The names of the files."""
COLUMNS = (
    *("class", "name", "images", "correct", "accuracy", "mean_confidence", "most_common_wrong"),
    *("accuracy_low", "accuracy_high"),
)
"""The columns of per_class.csv. Accuracies and the ends of their 95 % interval are in percent."""


def write_report(
    evaluation: Evaluation,
    directory: Path,
    *,
    dataset_root: Path | None,
    about: dict[str, Any],
    calibrated: tuple[Calibration, Effect] | None = None,
    explained: Mapping[int, ExplainedImage] | None = None,
) -> list[Path]:
    """Write results.json, per_class.csv and report.html, each atomically.

    The page is self-contained: it needs no other file and no network.

    Args:
        evaluation: An evaluation of at least one image.
        directory: Folder for the files, created if missing.
        dataset_root: Folder that the evaluation's paths are relative to, read for the thumbnails; None for a page
            without thumbnails.
        about: What was evaluated and how (model, checkpoint, preprocessing, versions, device). It is added to
            results.json; values that JSON has no type for become text.
        calibrated: The model's temperature and what it does to these probabilities.
        explained: What the model looks at in the images at some positions of the evaluation, for those in the list of
            mistakes (`worst_mistakes`).

    Returns:
        The paths of the three files.

    Raises:
        ValueError: Nothing was evaluated, or `about` uses a name that results.json uses itself.
        OSError: `directory` cannot be written to.
    """
    if not evaluation.paths:
        raise ValueError(
            f"no image was evaluated ({len(evaluation.skipped)} skipped), so there is nothing to report; "
            "check the folder and the split of the data set"
        )
    bins = reliability(evaluation)
    # The error of the other images must not pass for that of the whole data set.
    ece = expected_calibration_error(bins) if evaluation.is_finite_N.all() else math.nan
    finite = evaluation.losses_N.isfinite().tolist()
    non_finite = [path for path, is_finite in zip(evaluation.paths, finite, strict=True) if not is_finite]
    classes = per_class(evaluation)

    contents = (
        json.dumps(_results(evaluation, ece, non_finite, calibrated, about), indent=2, allow_nan=False) + "\n",
        _per_class_csv(evaluation.class_names, classes),
        render_page(evaluation, classes, bins, ece, non_finite, dataset_root, about, calibrated, explained),
    )
    for name, text in zip(FILES, contents, strict=True):
        with atomic_write(directory / name) as file:
            # A file name that is not valid UTF-8 contains lone surrogates, which UTF-8 cannot encode.
            file.write_bytes(text.encode(errors="backslashreplace"))
    return [directory / name for name in FILES]


def _results(
    evaluation: Evaluation,
    ece: float,
    non_finite: list[str],
    calibrated: tuple[Calibration, Effect] | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "acc1": evaluation.acc1,
        "acc1_interval": evaluation.acc1_interval,
        "acc5": evaluation.acc5,
        "acc5_interval": evaluation.acc5_interval,
        "loss": evaluation.loss,
        "ece": ece,
        "count": len(evaluation.paths),
        "skipped": {"count": len(evaluation.skipped), "names": evaluation.skipped},
        "non_finite_loss": {"count": len(non_finite), "names": non_finite},
    }
    if calibrated:
        calibration, effect = calibrated
        results["calibrated"] = {
            "temperature": calibration.temperature,
            "fitted_images": calibration.num_images,
            "ece": effect.ece,
            "loss": effect.loss,
            "cross_fitted": effect.is_cross_fitted,
        }
    if taken := results.keys() & about.keys():
        raise ValueError(
            f"about contains {', '.join(sorted(taken))}, which results.json takes from the evaluation; remove it there"
        )
    return _plain({**results, **about})


def _plain(value: Any) -> Any:
    """`value` in types that JSON has. Numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)  # tensors and NumPy numbers


def _per_class_csv(class_names: list[str], classes: list[ClassMetrics]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # else a bare \r is not quoted
    writer.writerow(COLUMNS)
    for row in classes:
        confidence = f"{row.mean_confidence:.6f}" if math.isfinite(row.mean_confidence) else ""
        wrong = "" if row.most_common_wrong is None else class_names[row.most_common_wrong]
        accuracy = f"{100 * row.accuracy:.3f}"
        low, high = (f"{end:.3f}" for end in row.interval)
        writer.writerow((row.index, row.name, row.images, row.correct, accuracy, confidence, wrong, low, high))
    return text.getvalue()
