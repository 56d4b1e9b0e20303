"""How predictions are written: one after another as they come, so that no format holds more than one."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from localvit.evaluation.predict import Prediction


def _rounded(probability: float) -> float:
    """To six digits: the rest is rounding that differs between machines."""
    return float(f"{probability:.6g}")


def _row(prediction: "Prediction", names: Sequence[str]) -> dict[str, Any]:
    best = [
        {"class": index, "name": names[index], "probability": _rounded(probability)}
        for index, probability in zip(prediction.classes, prediction.probabilities, strict=True)
    ]
    return {"file": prediction.file, "predictions": best, "error": prediction.error}


def write_jsonl(predictions: Iterable["Prediction"], names: Sequence[str], stream: TextIO) -> None:
    """An object a line: `file`, `predictions` (best first, of `class`, `name`, `probability`) and `error` or null."""
    for prediction in predictions:
        stream.write(json.dumps(_row(prediction, names)) + "\n")
        stream.flush()


def write_json(predictions: Iterable["Prediction"], names: Sequence[str], stream: TextIO) -> None:
    """One JSON array of `write_jsonl`'s objects, which is closed whatever stops it."""
    separator = ""
    stream.write("[")
    try:
        for prediction in predictions:
            stream.write(f"{separator}\n{json.dumps(_row(prediction, names))}")
            stream.flush()
            separator = ","
    finally:
        stream.write("\n]\n")


def write_csv(predictions: Iterable["Prediction"], names: Sequence[str], stream: TextIO) -> None:
    """A line for each class of each image: file, rank from 1, class, name, probability; or one with the error."""
    writer = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a bare \r would stay unquoted
    writer.writerow(("file", "rank", "class", "name", "probability", "error"))
    for prediction in predictions:
        row = _row(prediction, names)
        for rank, best in enumerate(row["predictions"], start=1):
            writer.writerow((row["file"], rank, best["class"], best["name"], best["probability"], ""))
        if row["error"]:
            writer.writerow((row["file"], "", "", "", "", row["error"]))
        stream.flush()


def write_table(predictions: Iterable["Prediction"], names: Sequence[str], stream: TextIO) -> None:
    """For people: each image with its classes below each other."""
    stream.write(f"{'probability':>11}  class\n")
    for prediction in predictions:
        stream.write(f"{printable(prediction.file)}\n")
        for index, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            stream.write(f"{100 * probability:9.2f} %  {printable(names[index])}\n")
        if prediction.error:
            stream.write(f"{'error':>11}  {printable(prediction.error)}\n")
        stream.flush()


def printable(text: str) -> str:
    """`text` with what would upset a terminal written as escapes: control characters, and bytes that were no UTF-8."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


WRITERS: dict[str, Callable[[Iterable["Prediction"], Sequence[str], TextIO], None]] = {
    "table": write_table,
    "csv": write_csv,
    "json": write_json,
    "jsonl": write_jsonl,
}
