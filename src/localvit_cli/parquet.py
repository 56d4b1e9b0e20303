"""Predictions as a Parquet file, which needs the package pyarrow."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from localvit.evaluation.predict import Prediction
from localvit_cli import UsageError
from localvit_cli.prediction_formats import row_of

_ROWS_IN_MEMORY = 10_000


def check_parquet(output: Path | None) -> None:
    """Raise UsageError without a file to write to, and ImportError without pyarrow."""
    if output is None:
        raise UsageError("--format parquet is not text: give a file with --output FILE")
    _library()


def write_parquet(predictions: Iterable[Prediction], path: Path) -> None:
    """One row per image, with the entries of `row_of`.

    Names that are not valid Unicode are written escaped.
    """
    arrow, parquet = _library()
    best = arrow.struct([("class", arrow.int64()), ("name", arrow.string()), ("probability", arrow.float64())])
    columns = [("file", arrow.string()), ("predictions", arrow.list_(best)), ("abstained", arrow.bool_())]
    schema = arrow.schema([*columns, ("error", arrow.string())])
    rows = (_unicode(row_of(prediction)) for prediction in predictions)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(rows, _ROWS_IN_MEMORY)):
            writer.write_table(arrow.Table.from_pylist(some, schema=schema))


def _library() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("--format parquet needs pyarrow: pip install 'localvit[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _unicode(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _unicode(item) for key, item in value.items()}
    return [_unicode(item) for item in value] if isinstance(value, list) else value
