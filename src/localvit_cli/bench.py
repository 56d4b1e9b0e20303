"""`localvit bench`: measure speed, latency, memory and cost of models."""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from localvit.bench.measure import measure, number_of_rounds
from localvit.bench.prepare import BenchOptions
from localvit.bench.result import NOISE_LIMIT, BenchResult
from localvit.bench.tables import as_text, as_values
from localvit.utils.devices import DTYPES, choose_device
from localvit.utils.files import check_writable
from localvit_cli import UsageError
from localvit_cli.bench_runtimes import parse_runtimes, prepare_all
from localvit_cli.console import progress
from localvit_cli.eval import image_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed, latency, memory and cost of models.

    The models run in turn, round by round, so that they can be compared.
    """

    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...", help_behavior_hint="(required)")
    ]
    """Model names (random weights; nothing is downloaded), checkpoints or exported files."""
    baseline: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = "deit_tiny_patch16_224"
    """Model to compare with, measured in the same rounds; None for no comparison."""
    runtime: str = "torch"
    """What runs the models, with commas between: torch, torch-compile, onnxruntime, onnxruntime-int8, openvino,
    openvino-bfloat16, openvino-int8, executorch. Exported files run in their own."""
    train: bool = False
    """Measure training steps (forward, cross entropy, backward, AdamW) instead of inference."""
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    """Batch sizes, measured one after the other."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In inference the model is converted to it; in training it is the dtype of autocast."""
    compile: bool = False
    """Compile the models with torch.compile, for each batch size."""
    channels_last: bool = False
    """Use the channels-last memory format for images and weights."""
    fuse: bool = True
    """Fuse the models for inference, with localvit.fuse."""
    device: Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cuda, mps or cpu; by default the first one available."""
    rounds: int = 11
    """Number of rounds, at least 3."""
    input_size: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Side of the images, or height and width, in pixels; by default that of each model."""
    json: bool = False
    """Print JSON instead of tables."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw published accuracy against images/s into this file: .png, .svg or .pdf."""
    force: bool = False
    """Report the numbers even if the machine is too noisy. It is, if the interquartile range of a model's speed
    relative to the baseline (of its images/s without a baseline) exceeds 10 % of the median at any batch size."""

    def run(self) -> None:
        """Measure, print the tables or JSON, and draw the plot if asked for. Raises RuntimeError if it is too noisy."""
        if not self.names:
            raise UsageError(
                "no model given; give model names (`localvit models` lists ours), checkpoints or exported files"
            )
        size = image_size(self.input_size)
        options = self._options()
        draw = _drawing_function(self.plot) if self.plot else None  # errors must come before minutes of measuring
        measured = self._measure(options, size)
        self._check_noise(measured)
        try:
            print(json.dumps(as_values(measured), indent=2) if self.json else as_text(measured), flush=True)
        finally:  # the plot is drawn even if nobody reads the tables
            if draw and self.plot:
                left_out = draw(measured, self.plot)
                logger.info(f"plot: {self.plot}")
                if left_out:
                    logger.info(f"not in the plot, as no accuracy is published: {', '.join(left_out)}")

    def _options(self) -> BenchOptions:
        try:
            device, warning = choose_device(self.device)
            options = BenchOptions(
                device=device,
                dtype=DTYPES[self.dtype],
                train=self.train,
                batch_sizes=self.batch_sizes,
                rounds=self.rounds,
                compile=self.compile,
                channels_last=self.channels_last,
                fuse=self.fuse,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        if warning:
            logger.warning(warning)
        else:
            logger.info(f"device: {device}")
        return options

    def _measure(self, options: BenchOptions, size: tuple[int, int] | None) -> BenchResult:
        runtimes = parse_runtimes(self.runtime)
        if self.plot and len(runtimes) > 1:
            raise UsageError("--plot shows one runtime: name one with --runtime")
        with tempfile.TemporaryDirectory() as folder:
            models = prepare_all(self.names, self.baseline, runtimes, options, size, Path(folder))
            if self.plot and all(model.acc1 is None for model in models):
                names = ", ".join(dict.fromkeys(model.name for model in models))
                raise UsageError(f"--plot: no accuracy is published for {names} at this image size")
            with progress("bench", number_of_rounds(options), "rounds") as advance:
                return measure(models, options, baseline=self.baseline, progress=advance)

    def _check_noise(self, measured: BenchResult) -> None:
        noise = measured.noise()
        if not noise:
            return
        message = f"this machine is too noisy to compare models: {'; '.join(noise)}"
        if not self.force:
            raise RuntimeError(
                f"{message} (the limit is {NOISE_LIMIT:.0%}). Stop other programs, fix the clock rate of the "
                "processor, or raise --rounds; --force reports the numbers as they are"
            )
        logger.warning(message)


def _drawing_function(image: Path) -> Callable[[BenchResult, Path], list[str]]:
    from localvit.bench.plot import FORMATS, draw_speeds  # needs matplotlib, an extra

    if image.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {image} must end in {', '.join(FORMATS)}")
    check_writable(image)
    return draw_speeds
