"""Means, spreads and paired differences against numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adafrugal.reports.statistics import Contrast, Sample, contrast, student

NUMBERS = st.floats(-100, 100)


def test_a_sample_is_a_mean_and_the_deviation_that_divides_by_n_less_one():
    assert Sample.of([1.0, 2.0, 6.0]) == Sample(3.0, pytest.approx(math.sqrt(7)), 3)
    assert Sample.of([4.0]) == Sample(4.0, None, 1)


def test_the_quantiles_are_those_of_any_table_of_students_t():
    assert [student(n) for n in (1, 2, 4, 30)] == pytest.approx([12.7062, 4.3027, 2.7764, 2.0423], abs=1e-4)


def test_a_contrast_weighs_arms_seed_by_seed():
    numbers = {"a": {0: 5.1, 1: 6.1, 2: 7.4}, "b": {0: 5.0, 1: 6.0, 2: 7.0, 3: 99.0}}
    half = 4.3027 * math.sqrt(0.03) / math.sqrt(3)  # differences 0.1, 0.1, 0.4: mean 0.2, variance 0.03
    found = contrast(numbers, {"a": 1, "b": -1})
    assert (found.mean, found.n) == (pytest.approx(0.2), 3)
    assert (found.low, found.high) == (pytest.approx(0.2 - half, abs=1e-4), pytest.approx(0.2 + half, abs=1e-4))
    assert contrast({"a": {0: 3.0}, "b": {0: 1.0}, "c": {0: 0.5}}, {"a": 1, "b": -2, "c": 2}) == Contrast(
        2.0, None, None, 1
    )


@pytest.mark.parametrize("numbers", [{"a": {0: 1.0}, "b": {1: 1.0}}, {"a": {0: 1.0}}])
def test_without_a_seed_that_all_arms_have_there_is_no_difference(numbers):
    assert contrast(numbers, {"a": 1, "b": -1}) is None


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=6), NUMBERS)
def test_an_offset_of_a_seed_in_both_arms_makes_no_difference(pairs, shift):
    plain = {"a": {i: a for i, (a, _) in enumerate(pairs)}, "b": {i: b for i, (_, b) in enumerate(pairs)}}
    shifted = {arm: {i: v + shift * i for i, v in values.items()} for arm, values in plain.items()}
    one, other = (contrast(numbers, {"a": 1, "b": -1}) for numbers in (plain, shifted))
    assert (other.mean, other.low) == (pytest.approx(one.mean, abs=1e-6), pytest.approx(one.low, abs=1e-5))
