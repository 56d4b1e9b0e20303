"""Calibration: is a model right as often as it says?

On Calibration of Modern Neural Networks, arXiv 1706.04599, section 2.

Shapes: N images, M bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies above `lower` and up to `upper`; with no image its two means are NaN."""

    lower: float
    upper: float
    count: int
    confidence: float
    """Mean probability of the predicted class, 0 to 1."""
    accuracy: float
    """Share of the images predicted right, 0 to 1."""


def reliability_bins(confidences_N: Tensor, correct_N: Tensor, *, bins: int = 15) -> list[Bin]:
    """The bars of a reliability diagram: images sorted into equal widths of confidence (equation 2's bins).

    Args:
        confidences_N: probability of each image's predicted class, 0 to 1.
        correct_N: whether that class is the true one, bool.
        bins: M, how many widths divide 0 to 1; each holds its upper edge, the first also 0.

    Raises:
        ValueError: a confidence is no probability, or the two lengths differ.
    """
    if confidences_N.shape != correct_N.shape or confidences_N.ndim != 1:
        raise ValueError(
            f"confidences {tuple(confidences_N.shape)}, correct {tuple(correct_N.shape)}: not two rows of equal length"
        )
    confidences_N = confidences_N.double()
    if not ((confidences_N >= 0) & (confidences_N <= 1 + 1e-6)).all():
        raise ValueError("a confidence is not a probability from 0 to 1; leave images without a finite one out first")
    edges = [m / bins for m in range(bins + 1)]
    bin_N = torch.bucketize(confidences_N, torch.tensor(edges[1:-1], dtype=torch.float64))
    counts_M = bin_N.bincount(minlength=bins)
    confidence_M = bin_N.bincount(confidences_N, minlength=bins) / counts_M
    accuracy_M = bin_N.bincount(correct_N.double(), minlength=bins) / counts_M
    columns = edges[:-1], edges[1:], counts_M.tolist(), confidence_M.tolist(), accuracy_M.tolist()
    return [Bin(*values) for values in zip(*columns, strict=True)]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Distance of confidence from accuracy, averaged over images, 0 to 1 (equation 3); NaN with no image."""
    count = sum(bin.count for bin in bins)
    gaps = [bin.count * abs(bin.accuracy - bin.confidence) for bin in bins if bin.count]
    return sum(gaps) / count if count else float("nan")
