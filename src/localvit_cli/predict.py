"""`localvit predict`: the classes that a model sees in images."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from localvit_cli import UsageError
from localvit_cli.eval import Running, square
from localvit_cli.prediction_formats import WRITERS, printable


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Tell the best classes of images. An image that cannot be read is named, the rest are done; the status is 1."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint file, or a model's name (its released weights are downloaded unless --checkpoint is given)."""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")]
    """Files, folders (with their sub-folders, hidden ones left out) and patterns like 'photos/**/*.jpg'."""
    topk: int = 5
    """How many classes of each image."""
    format: Literal["table", "csv", "json", "jsonl"] = "table"
    """csv has a line a class; json and jsonl an object an image. Unreadable images are in each, with their error."""
    output: Path | None = None
    """File to write, whole or not at all; by default standard output."""
    checkpoint: Path | None = None
    """Weights for the model of the given name."""
    weights: Literal["raw", "ema"] = "raw"
    """Raw or averaged weights of a checkpoint."""
    input_size: tuple[int, ...] = ()
    """Side of the images, or height and width, in pixels; by default the model's own."""
    running: Annotated[Running, tyro.conf.arg(name="")] = field(default_factory=Running)

    def run(self) -> int:
        """Predict and write as the predictions come; 1 if any image could not be done."""
        from localvit.data.paths import MentionedImages
        from localvit.evaluation.predict import Prediction, predict, readable_class_names
        from localvit.inference.runner import ready_model
        from localvit_cli.console import progress, say

        if not self.paths:
            raise UsageError("no image is named; give files, folders or patterns after the model")
        size = square(self.input_size)
        images = MentionedImages(self.paths)
        ready = ready_model(self.model, checkpoint=self.checkpoint, weights=self.weights, input_size=size)
        options = self.running.options()
        say(f"model: {ready.description}; {ready.preprocessing}")
        predictions = predict(ready.place(options), images, ready.preprocessing, options, topk=self.topk)
        num_classes: Any = ready.model.num_classes
        names = readable_class_names(ready.class_names, num_classes)
        failures = 0

        def counted() -> Iterator[Prediction]:
            nonlocal failures
            for prediction in predictions:
                if prediction.error:
                    failures += 1
                    say(f"{printable(prediction.file)}: {printable(prediction.error)}")
                advance(1)
                yield prediction

        on_terminal = self.output is None and sys.stdout.isatty()  # where the rows themselves are the progress
        with (
            _destination(self.output) as stream,
            nullcontext(lambda done: None) if on_terminal else progress("predict", len(images)) as advance,
        ):
            WRITERS[self.format](counted(), names, stream)
        if failures:
            say(f"{failures:,} of {len(images):,} images have no prediction")
        return 1 if failures else 0


@contextmanager
def _destination(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its name once it is whole; names that are not UTF-8 are written escaped."""
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        yield sys.stdout
        sys.stdout.flush()
        return
    if output.exists() and not output.is_file():
        raise ValueError(f"--output {output} is no ordinary file; give the path of one, or leave --output out")
    from localvit.utils.files import atomic_write

    with (
        atomic_write(output) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        yield stream
