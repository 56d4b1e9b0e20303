"""`localvit bench`: speed, latency, memory and cost of models beside a baseline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit_cli import UsageError

if TYPE_CHECKING:
    from localvit.bench.prepare import BenchOptions
    from localvit.bench.result import Bench as Measured


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed, latency, memory and cost of models.

    The models run in turn, round by round, so that they can be compared.
    """

    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...", help_behavior_hint="(required)")
    ]
    """Model names (random weights; nothing is downloaded) or checkpoint files."""
    baseline: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = "deit_tiny_patch16_224"
    """Model to compare with, measured in the same rounds; None for no comparison."""
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
        """Measure, print the tables or JSON, and draw if asked."""
        from localvit_cli.eval import square

        if not self.names:
            raise UsageError("no model is named; give names (`localvit models` lists ours) or checkpoint files")
        size = square(self.input_size)
        options = self._options()
        if self.plot:
            _check_plot(self.plot)  # before minutes of measuring
        measured = self._measure(options, size)

        from localvit.bench.tables import as_text, as_values
        from localvit_cli.console import say

        if noisy := measured.noisy():
            if not self.force:
                raise RuntimeError(_refusal(noisy))
            say(f"warning: this machine is too noisy to tell: {'; '.join(noisy)}")
        print(json.dumps(as_values(measured), indent=2) if self.json else as_text(measured), flush=True)
        if self.plot:
            from localvit.bench.plot import draw_speeds

            left_out = draw_speeds(measured, self.plot)
            say(f"plot: {self.plot}")
            if left_out:
                say(f"plot: left out, for want of a published accuracy: {', '.join(left_out)}")

    def _options(self) -> "BenchOptions":
        from localvit.bench.prepare import BenchOptions
        from localvit.utils.devices import DTYPES, choose_device
        from localvit_cli.console import say

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
        say(f"warning: {warning}" if warning else f"device: {device}")
        return options

    def _measure(self, options: "BenchOptions", size: tuple[int, int] | None) -> "Measured":
        from localvit.bench.measure import bench, number_of_rounds
        from localvit.bench.prepare import prepare
        from localvit_cli.console import progress

        names = dict.fromkeys((*self.names, *([self.baseline] if self.baseline else [])))
        models = [prepare(name, options, size) for name in names]
        if self.plot and all(model.acc1 is None for model in models):
            raise UsageError(f"--plot: no accuracy is published for {', '.join(names)} at this image size")
        with progress("bench", number_of_rounds(options), "rounds") as advance:
            return bench(models, options, baseline=self.baseline, progress=advance)


def _check_plot(image: Path) -> None:
    from localvit.bench.plot import FORMATS

    if image.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {image} must end in {', '.join(FORMATS)}")


def _refusal(noisy: list[str]) -> str:
    return (
        f"this machine is too noisy to tell: {'; '.join(noisy)} (above 10 % is too much). End what else runs on it, "
        "keep it from changing its clock rate, raise --rounds; or take the numbers as they are with --force"
    )
