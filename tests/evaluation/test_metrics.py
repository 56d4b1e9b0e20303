"""Calibration error, compared with hand-computed values and the definition in NumPy."""

import math

import numpy as np
import pytest
import torch

from localvit.evaluation.metrics import expected_calibration_error, reliability_bins


@pytest.mark.parametrize(
    ("confidences", "correct", "expected"),
    [
        pytest.param([0.9] * 4 + [0.3] * 2, [1, 1, 1, 0, 0, 0], (4 * 0.15 + 2 * 0.3) / 6, id="two bins"),
        pytest.param([0.2, 0.21], [1, 0], (0.8 + 0.21) / 2, id="0.2 = 3/15 belongs to the bin that ends there"),
        pytest.param([0.0, 0.01], [0, 1], abs(0.5 - 0.005), id="0 is in the first bin"),
        pytest.param([1.0, 1.0], [1, 1], 0.0, id="confident and correct"),
        pytest.param([1.0], [0], 1.0, id="confident and wrong"),
    ],
)
def test_calibration_error_equals_hand_computed_values(confidences, correct, expected):
    bins = reliability_bins(torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct).bool())
    assert expected_calibration_error(bins) == pytest.approx(expected, abs=1e-12)  # a few float64 roundings
    assert sum(bin.count for bin in bins) == len(correct)


def test_calibration_error_equals_the_definition_in_numpy():
    generator = np.random.default_rng(3)
    # All edges are included: m / 15 belongs to the bin below the edge.
    confidences = np.concatenate([generator.beta(5, 2, 997), np.arange(16) / 15])
    correct = generator.random(len(confidences)) < confidences**2
    error = 0.0
    for m in range(15):
        inside = (confidences > m / 15) & (confidences <= (m + 1) / 15)
        if m == 0:
            inside |= confidences == 0
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    bins = reliability_bins(torch.from_numpy(confidences), torch.from_numpy(correct))
    assert expected_calibration_error(bins) == pytest.approx(error, abs=1e-12)  # sums in another order


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_an_invalid_confidence_is_an_error(bad):
    with pytest.raises(ValueError, match="not a probability"):
        reliability_bins(torch.tensor([0.5, bad]), torch.tensor([True, False]))


def test_different_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"\(3,\) and correct \(2,\)"):
        reliability_bins(torch.rand(3), torch.tensor([True, False]))
