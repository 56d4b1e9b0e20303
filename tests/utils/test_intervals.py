"""The interval of an accuracy, compared with its defining equation, published values and the coverage it promises."""

from math import comb
from statistics import NormalDist

import pytest

from localvit.utils.intervals import accuracy_interval, interval_text


@pytest.mark.parametrize(("hits", "count"), [(15, 18), (1, 7), (8386, 10_000), (37_419, 50_000)])
def test_both_ends_are_z_standard_deviations_from_the_accuracy(hits, count):
    z = NormalDist().inv_cdf(0.975)
    for end, sign in zip(accuracy_interval(100 * hits / count, count), (-1, 1), strict=True):
        share = end / 100
        assert share + -sign * z * (share * (1 - share) / count) ** 0.5 == pytest.approx(hits / count, abs=1e-12)


def test_it_equals_the_values_of_newcombe():
    """Table I of Newcombe (Statistics in Medicine 17, 1998): 81 of 263, and 0 of 20, by the score method."""
    assert accuracy_interval(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.006)
    assert accuracy_interval(0.0, 20) == pytest.approx((0.0, 16.11), abs=0.006)
    assert accuracy_interval(100.0, 20) == pytest.approx((83.89, 100.0), abs=0.006)


def test_18_images_of_a_model_that_is_right_in_85_percent_are_covered():
    """The probability that the interval contains the truth, summed over all numbers of hits."""
    inside = sum(
        comb(18, hits) * 0.85**hits * 0.15 ** (18 - hits)
        for hits in range(19)
        if accuracy_interval(100 * hits / 18, 18)[0] <= 85 <= accuracy_interval(100 * hits / 18, 18)[1]
    )
    assert inside == pytest.approx(0.95, abs=0.03)  # numbers of hits are whole


def test_the_text_has_as_many_decimals_as_the_images_tell():
    assert interval_text(100 * 15 / 18, 18) == "60.8 to 94.2"
    assert interval_text(74.838, 50_000) == "74.46 to 75.22"
