"""`localvit predict`: the classes of images."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TextIO, TypedDict

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


class Decision(TypedDict):
    """The options of `Predict.decision`."""

    topk: int
    calibrated: bool
    abstain_below: float | None


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict the top classes of images. Exits with 1 if an image is unreadable."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint or exported file, or a name (weights outside this package are downloaded without --checkpoint)."""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...", help_behavior_hint="")]
    """Files, folders (including their subfolders, without hidden ones) and patterns such as 'photos/**/*.jpg'."""
    topk: int = 5
    """Number of classes per image."""
    calibrated: bool = False
    """Use the temperature in the checkpoint, so that probabilities agree with the accuracy (see eval
    --fit-temperature)."""
    abstain_below: Annotated[float | None, optional("P")] = None
    """Mark an image as abstained if its best probability, from 0 to 1, is below P."""
    format: Literal["table", "csv", "json", "jsonl", "parquet"] = "table"
    """csv has one line per class, the others after it one object or row per image. All include unreadable images, and
    say whether the model abstained."""
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
        self._check()
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
        predictions = predict(loaded, images, options=options, **self.decision())
        to_terminal = self.output is None and sys.stdout.isatty()  # there the output itself shows the progress
        with nullcontext(lambda done: None) if to_terminal else progress("predict", len(images)) as advance:
            counted = Counted(predictions, advance)
            write_predictions(self.format, self.output, counted)
        return counted.report()

    def decision(self) -> Decision:
        """The options of `localvit.predict` that determine what is said of an image."""
        return {"topk": self.topk, "calibrated": self.calibrated, "abstain_below": self.abstain_below}

    def _check(self) -> None:
        if self.abstain_below is not None and not 0 <= self.abstain_below <= 1:
            raise UsageError(f"--abstain-below {self.abstain_below:g} must be a probability from 0 to 1, such as 0.5")


class Counted(Iterable[Prediction]):
    """Predictions that are counted as they are written; errors are logged."""

    def __init__(self, predictions: Iterable[Prediction], advance: Callable[[int], None] = lambda done: None) -> None:
        self.predictions, self.advance = predictions, advance
        self.total = self.failures = self.abstained = 0

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self.predictions:
            self.total += 1
            self.abstained += prediction.abstained
            if prediction.error:
                self.failures += 1
                logger.warning(f"{printable(prediction.file)}: {printable(prediction.error)}")
            self.advance(1)
            yield prediction

    def report(self) -> int:
        """Log how many images have no prediction or an abstained one. Returns the exit status."""
        if self.abstained:
            logger.info(f"abstained on {self.abstained:,} of {self.total:,} images")
        if self.failures:
            logger.warning(f"{self.failures:,} of {self.total:,} images have no prediction")
        return 1 if self.failures else 0


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
