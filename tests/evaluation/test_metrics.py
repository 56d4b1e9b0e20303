"""Calibration error against hand-computed values and the definition written out in numpy."""

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
        pytest.param([1.0, 1.0], [1, 1], 0.0, id="sure and right"),
        pytest.param([1.0], [0], 1.0, id="sure and wrong"),
    ],
)
def test_calibration_error_by_hand(confidences, correct, expected):
    bins = reliability_bins(torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct).bool())
    assert expected_calibration_error(bins) == pytest.approx(expected, abs=1e-12)  # a few float64 roundings
    assert sum(bin.count for bin in bins) == len(correct)


def test_calibration_error_matches_the_definition_in_numpy():
    generator = np.random.default_rng(3)
    # Every edge itself is among them: m / 15 must fall below the edge, not above.
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
def test_a_confidence_that_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match="not a probability"):
        reliability_bins(torch.tensor([0.5, bad]), torch.tensor([True, False]))


def test_rows_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\) and correct \(2,\)"):
        reliability_bins(torch.rand(3), torch.tensor([True, False]))
