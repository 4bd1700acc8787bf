"""Means, spreads and paired differences against numbers worked out by hand."""

import math

import pytest
from scipy import stats

from adafrugal.reports.statistics import Sample, contrast, crossing, holm


def test_a_sample_is_a_mean_and_the_deviation_that_divides_by_n_less_one():
    assert Sample.of([1.0, 2.0, 6.0]) == Sample(3.0, pytest.approx(math.sqrt(7)), 3)
    assert Sample.of([4.0]) == Sample(4.0, None, 1)
    assert Sample.of([4.0]).interval is Sample.of([4.0]).p is None


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (31, 2.0423)])
def test_an_interval_has_students_t_with_n_less_one_degrees_of_freedom(n, quantile):
    half = quantile * 2 / math.sqrt(n)
    assert Sample(5.0, 2.0, n).interval == pytest.approx((5 - half, 5 + half), abs=1e-4)


def test_a_contrast_weighs_arms_seed_by_seed():
    numbers = {"a": {0: 5.1, 1: 6.1, 2: 7.4}, "b": {0: 5.0, 1: 6.0, 2: 7.0, 3: 99.0}}
    found = contrast(numbers, {"a": 1, "b": -1})  # differences 0.1, 0.1, 0.4
    assert (found.mean, found.spread, found.n) == (pytest.approx(0.2), pytest.approx(math.sqrt(0.03)), 3)
    one = {"a": {0: 3.0}, "b": {0: 1.0}, "c": {0: 0.5}}
    assert contrast(one, {"a": 1, "b": -2, "c": 2}) == Sample(2.0, None, 1)


@pytest.mark.parametrize("numbers", [{"a": {0: 1.0}, "b": {1: 1.0}}, {"a": {0: 1.0}}])
def test_without_a_seed_that_all_arms_have_there_is_no_difference(numbers):
    assert contrast(numbers, {"a": 1, "b": -1}) is None


@pytest.mark.parametrize("numbers", [[-0.1, -0.12, -0.07, -0.11, -0.1], [0.3, -0.2, 0.1], [1.0, 2.0]])
def test_p_is_that_of_a_paired_t_test(numbers):
    assert Sample.of(numbers).p == pytest.approx(stats.ttest_rel(numbers, [0.0] * len(numbers)).pvalue, rel=1e-9)


def test_p_of_equal_differences_needs_no_division_by_0():
    assert (Sample.of([0.0, 0.0]).p, Sample.of([0.5, 0.5]).p) == (1.0, 0.0)


@pytest.mark.parametrize(("p", "adjusted"), [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # × 3, 1, 2, 4; the second is no smaller than the third
    ([0.5, 0.4, 0.01], [0.8, 0.8, 0.03]),
    ([0.7, 0.6], [1.0, 1.0]),
    ([], []),
])  # fmt: skip
def test_holm_multiplies_by_the_number_of_what_is_left(p, adjusted):
    assert holm(p) == pytest.approx(adjusted)


def test_a_crossing_lies_on_the_line_between_two_means():
    at, ends = crossing({0.0: [0.5, 0.3], 1.0: [0.2, 0.4], 2.0: [-0.1, -0.1]})  # means 0.4, 0.3, -0.1
    assert at == pytest.approx(1.75)
    assert ends == (-math.inf, pytest.approx(1.94)), "of two seeds: 12.7 standard errors, 0 at the last x"
    assert crossing({2.0: [-0.1], 1.0: [0.3]}) == (pytest.approx(1.75), None)


def test_a_crossings_interval_is_where_a_t_test_does_not_tell_the_mean_from_0():
    """Three seeds on straight lines of one slope: the mean is 0.4 − x, and its half width everywhere that of ±0.01."""
    half = 4.3027 * 0.01 / math.sqrt(3)
    at, ends = crossing({x: [0.39 - x, 0.4 - x, 0.41 - x] for x in (0.0, 0.5, 1.0)})
    assert (at, *ends) == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=0.003)
    assert at == pytest.approx(0.4)


@pytest.mark.parametrize(("first", "last", "expected"), [
    ([-0.11, -0.1], [-0.31, -0.3], (-math.inf, (-math.inf, -math.inf))),
    ([-0.02, 0.01], [-0.31, -0.3], (-math.inf, (-math.inf, 0.43))),
    ([0.31, 0.3], [0.11, 0.1], (math.inf, (math.inf, math.inf))),
    ([0.31, 0.3], [0.02, -0.01], (math.inf, (0.57, math.inf))),
    ([0.1, 0.1], [-0.1, -0.1], (0.5, (0.5, 0.5))),
    ([0.31, 0.3], [0.1, -0.1], (1.0, (0.16, math.inf))),
])  # fmt: skip
def test_what_lies_outside_the_curve_is_not_extrapolated(first, last, expected):
    at, ends = crossing({0.0: first, 1.0: last})
    assert (at, ends) == (expected[0], pytest.approx(expected[1]))
