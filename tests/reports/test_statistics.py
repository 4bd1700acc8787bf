"""Means, spreads and paired differences against numbers worked out by hand."""

import math

import pytest

from adafrugal.reports.statistics import Sample, contrast


def test_a_sample_is_a_mean_and_the_deviation_that_divides_by_n_less_one():
    assert Sample.of([1.0, 2.0, 6.0]) == Sample(3.0, pytest.approx(math.sqrt(7)), 3)
    assert Sample.of([4.0]) == Sample(4.0, None, 1)
    assert Sample.of([4.0]).interval is None


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
