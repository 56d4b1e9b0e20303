"""Output formats for predictions. Each writes one prediction at a time, so memory stays bounded."""

import csv
import json
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from localvit.evaluation.predict import Prediction
from localvit_cli.streams import printable


def _rounded(probability: float) -> float:
    """Rounded to six digits, because the others differ between machines."""
    return float(f"{probability:.6g}")


def row_of(prediction: Prediction) -> dict[str, Any]:
    """What `write_jsonl` writes of an image."""
    best = [
        {"class": index, "name": name, "probability": _rounded(probability)}
        for index, name, probability in zip(
            prediction.classes, prediction.class_names, prediction.probabilities, strict=True
        )
    ]
    return {
        "file": prediction.file,
        "predictions": best,
        "abstained": prediction.abstained,
        "error": prediction.error,
    }


def write_jsonl(predictions: Iterable[Prediction], stream: TextIO) -> None:
    """One object per line: `file`, `predictions` (best first; `class`, `name`, `probability`), `abstained`, `error`."""
    for prediction in predictions:
        stream.write(json.dumps(row_of(prediction)) + "\n")
        stream.flush()


def write_json(predictions: Iterable[Prediction], stream: TextIO) -> None:
    """One JSON array of the objects of `write_jsonl`. It is closed even if an exception ends it early."""
    separator = ""
    stream.write("[")
    try:
        for prediction in predictions:
            stream.write(f"{separator}\n{json.dumps(row_of(prediction))}")
            stream.flush()
            separator = ","
    finally:
        stream.write("\n]\n")


def write_csv(predictions: Iterable[Prediction], stream: TextIO) -> None:
    """One line per class and image: file, rank from 1, class, name, probability; or one line with the error.

    `abstained` is true or false, the same in each line of an image.
    """
    writer = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # else a bare \r is not quoted
    writer.writerow(("file", "rank", "class", "name", "probability", "error", "abstained"))
    for prediction in predictions:
        row = row_of(prediction)
        abstained = "true" if row["abstained"] else "false"
        for rank, best in enumerate(row["predictions"], start=1):
            writer.writerow((row["file"], rank, best["class"], best["name"], best["probability"], "", abstained))
        if row["error"]:
            writer.writerow((row["file"], "", "", "", "", row["error"], abstained))
        stream.flush()


def write_table(predictions: Iterable[Prediction], stream: TextIO) -> None:
    """For people: the file name of each image, and a line for each of its classes."""
    stream.write(f"{'probability':>11}  class\n")
    for prediction in predictions:
        stream.write(f"{printable(prediction.file)}\n")
        for name, probability in zip(prediction.class_names, prediction.probabilities, strict=True):
            stream.write(f"{100 * probability:9.2f} %  {printable(name)}\n")
        if prediction.abstained:
            stream.write(f"{'abstained':>11}  the best probability is below --abstain-below\n")
        if prediction.error:
            stream.write(f"{'error':>11}  {printable(prediction.error)}\n")
        stream.flush()


WRITERS: dict[str, Callable[[Iterable[Prediction], TextIO], None]] = {
    "table": write_table,
    "csv": write_csv,
    "json": write_json,
    "jsonl": write_jsonl,
}
