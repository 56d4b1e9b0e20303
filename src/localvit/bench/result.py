"""The result of `localvit.bench.measure`, and whether the machine was too noisy for it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from localvit.bench.prepare import BenchModel, BenchOptions

NOISE_LIMIT = 0.1
"""Largest interquartile range, as a share of the median, of a reliable measurement (see `BenchResult.noise`)."""


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The median and the quartiles of some values."""

    median: float
    first_quartile: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Compute them from two or more values; they interpolate linearly between values."""
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, first_quartile=first, third_quartile=third)

    @property
    def relative_range(self) -> float:
        """The interquartile range divided by the median."""
        return (self.third_quartile - self.first_quartile) / self.median


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """One model at one batch size."""

    batch_size: int
    """Images per call."""
    calls_per_round: int
    """Calls that are timed together in each round."""
    images_per_second: Quartiles
    """Throughput."""
    ratio: Quartiles | None
    """Speed relative to the baseline, round by round; None for the baseline itself and without a baseline."""
    share_of_gemm_rate: Quartiles | None
    """Multiply-adds per second, as a share of those of a large matrix product in the same round.

    A training step counts as three forward passes, since each matrix product has two more in the backward pass. None
    for an exported file, whose multiply-adds are not known.
    """
    peak_memory_bytes: int | None
    """Memory of the model, of its optimizer in training, and the most that a call adds. None except on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of a call with one image that is already on the device."""

    p50_seconds: float
    p99_seconds: float
    calls: int
    """Number of timed calls."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Compute the percentiles of timed calls; they interpolate linearly between calls."""
        percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
        return cls(p50_seconds=percentiles[49], p99_seconds=percentiles[98], calls=len(seconds))


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """All results of one model."""

    model: BenchModel
    """What was measured."""
    batches: tuple[BatchResult, ...]
    """One per batch size, in the order of the options."""
    latency: Latency | None
    """None in training."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All results of one measurement, on one machine."""

    options: BenchOptions
    """What was asked for."""
    models: tuple[ModelResult, ...]
    """One per model, in the given order."""
    baseline: str | None
    """Name of the model that the others are compared with."""
    gemm_multiply_adds_per_second: Quartiles
    """Rate of a product of square matrices, over all rounds."""
    gemm_size: int
    """Number of rows, and of columns, of these matrices."""
    hardware: dict[str, str | int]
    """The hardware, as reported by torch and the platform."""
    versions: dict[str, str]
    """Versions of localvit, of the libraries and of Python."""

    def noise(self) -> list[str]:
        """Describe each measurement that is too noisy to be reliable; empty on a quiet machine.

        At every batch size, the interquartile range over rounds of each model's ratio to the baseline must be at most
        `NOISE_LIMIT` of its median. Without a baseline, the same holds for the images per second of each model.
        """
        compared = any(batch.ratio for result in self.models for batch in result.batches)
        found = []
        for result in self.models:
            for batch in result.batches:
                values = batch.ratio if compared else batch.images_per_second
                # Written so that a range of NaN counts as noise.
                if values is not None and not values.relative_range <= NOISE_LIMIT:
                    what = f"speed relative to {self.baseline}" if compared else "images/s"
                    found.append(
                        f"{result.model.title} at batch size {batch.batch_size}: the interquartile range of its {what} "
                        f"is {values.relative_range:.1%} of the median"
                    )
        return found
