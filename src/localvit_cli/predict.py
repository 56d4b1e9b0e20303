"""`localvit predict`: the classes of images."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

from localvit.data.folders import PathImages
from localvit.evaluation.predict import Prediction, predict
from localvit.inference.runner import load_model
from localvit.utils.files import atomic_write, check_writable
from localvit_cli import UsageError
from localvit_cli.console import progress
from localvit_cli.eval import InferenceFlags, image_size
from localvit_cli.parquet import check_parquet, write_parquet
from localvit_cli.predict_parts import predict_in_parts, shares_images
from localvit_cli.prediction_formats import WRITERS
from localvit_cli.streams import printable
from localvit_cli.tyro_rules import optional

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict the top classes of images. Exits with 1 if an image is unreadable."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint or exported file, or a name (weights outside this package are downloaded without --checkpoint)."""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...", help_behavior_hint="")]
    """Files, folders (including their subfolders, without hidden ones) and patterns such as 'photos/**/*.jpg'."""
    topk: int = 5
    """Number of classes per image."""
    format: Literal["table", "csv", "json", "jsonl", "parquet"] = "table"
    """csv has one line per class, the others after it one object or row per image. All include unreadable images."""
    output: Annotated[Path | None, optional("FILE", "standard output")] = None
    """File to write, atomically."""
    checkpoint: Annotated[Path | None, optional("FILE")] = None
    """Weights for the named model."""
    weights: Literal["raw", "ema"] = "raw"
    """Use the raw or the averaged (EMA) weights of a checkpoint."""
    input_size: Annotated[tuple[int, ...], optional("PIXELS...", "the model's own")] = ()
    """Side of the input, or its height and width, in pixels."""
    running: Annotated[InferenceFlags, tyro.conf.arg(name="")] = field(default_factory=InferenceFlags)

    def run(self) -> int:
        """Predict, writing each prediction as it is computed. Returns 1 if any image has no prediction."""
        if not self.paths:
            raise UsageError("no images given; add files, folders or patterns after the model")
        size = image_size(self.input_size)
        if self.output is not None:
            # A link such as /dev/stdout would be replaced by the file.
            if self.output.is_symlink() or (self.output.exists() and not self.output.is_file()):
                raise ValueError(f"--output {self.output} is not a regular file; give another path, or omit --output")
            check_writable(self.output)
        in_parts = shares_images(self.output)
        if self.format == "parquet":
            check_parquet(self.output)
        images = PathImages(self.paths)
        loaded = load_model(self.model, checkpoint=self.checkpoint, weights=self.weights, input_size=size)
        options = self.running.options()
        logger.info(f"model: {loaded}")
        if in_parts:
            return predict_in_parts(self, loaded, images, options)
        predictions = predict(loaded, images, options=options, topk=self.topk)
        failures = 0

        def reported() -> Iterator[Prediction]:
            nonlocal failures
            for prediction in predictions:
                if prediction.error:
                    failures += 1
                    logger.warning(f"{printable(prediction.file)}: {printable(prediction.error)}")
                advance(1)
                yield prediction

        to_terminal = self.output is None and sys.stdout.isatty()  # there the output itself shows the progress
        with nullcontext(lambda done: None) if to_terminal else progress("predict", len(images)) as advance:
            write_predictions(self.format, self.output, reported())
        if failures:
            logger.warning(f"{failures:,} of {len(images):,} images have no prediction")
        return 1 if failures else 0


def write_predictions(format: str, output: Path | None, predictions: Iterable[Prediction]) -> None:
    """Write predictions to standard output, or whole or not at all to a file."""
    if format == "parquet":
        assert output is not None
        with atomic_write(output) as unfinished:
            write_parquet(predictions, unfinished)
        return
    with _open_output(output) as stream:
        WRITERS[format](predictions, stream)


@contextmanager
def _open_output(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is written atomically. Names that are not valid UTF-8 are written escaped."""
    if output is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    with (
        atomic_write(output) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        yield stream
