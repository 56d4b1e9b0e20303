"""What `localvit.bench.measure` measures, and when a machine is too noisy for it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from localvit.bench.prepare import BenchModel, BenchOptions

NOISE_LIMIT = 0.1
"""The machine is too noisy to tell where an interquartile range exceeds this part of its median (`Bench.noisy`)."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of two or more values; quartiles interpolate between them."""
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, first_quartile=first, third_quartile=third)

    @property
    def relative(self) -> float:
        """The interquartile range over the median."""
        return (self.third_quartile - self.first_quartile) / self.median


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """One model at one batch size."""

    batch_size: int
    """Images a call."""
    calls_a_round: int
    """Calls timed together in each round."""
    images_per_second: Spread
    """Images a second."""
    ratio: Spread | None
    """Speed over the baseline's, round by round; None for the baseline itself, and without one."""
    share_of_floor: Spread
    """The time that its multiply-adds would take at the rate of the GEMM of the same round, over its own time.

    A training step counts as three forwards: each product has two more in the backward pass.
    """
    peak_memory_bytes: int | None
    """The model (in training with its optimizer's state) and the most that a call adds; known on CUDA alone."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of a call with one image, which lies on the device already."""

    p50_seconds: float
    p99_seconds: float
    calls: int
    """How many were timed."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Percentiles of timed calls; they interpolate between them."""
        percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
        return cls(p50_seconds=percentiles[49], p99_seconds=percentiles[98], calls=len(seconds))


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """Everything on one model."""

    model: BenchModel
    """What was measured."""
    batches: tuple[BatchResult, ...]
    """By batch size, as asked."""
    latency: Latency | None
    """None in training, where a single image is not waited for."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured in one go, on one machine."""

    options: BenchOptions
    """What was asked for."""
    models: tuple[ModelResult, ...]
    """In the order of asking."""
    baseline: str | None
    """Name of the model that the others are compared with."""
    gemm_multiply_adds_per_second: Spread
    """Rate of the product of square matrices, over all rounds."""
    gemm_size: int
    """Rows and columns of these matrices."""
    hardware: dict[str, str | int]
    """What it ran on, as torch and the platform call it."""
    versions: dict[str, str]
    """Of what computed."""

    def noisy(self) -> list[str]:
        """What tells that this machine is too noisy to tell, one text for each: empty when it is quiet enough.

        The rule: at every batch size, the interquartile range over rounds of each model's ratio to the baseline is at
        most `NOISE_LIMIT` of its median. Where no ratio is taken, the images/s of each model must hold to that.
        """
        compared = any(batch.ratio for result in self.models for batch in result.batches)
        found = []
        for result in self.models:
            for batch in result.batches:
                spread = batch.ratio if compared else batch.images_per_second
                if spread is not None and not spread.relative <= NOISE_LIMIT:
                    what = f"speed relative to {self.baseline}" if compared else "images/s"
                    found.append(
                        f"{result.model.name} at batch size {batch.batch_size}: the interquartile range of its {what} "
                        f"is {spread.relative:.1%} of the median"
                    )
        return found
