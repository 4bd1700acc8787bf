"""A search of rates, replayed from the losses of its trials."""

import math

import pytest

from adafrugal.reports.descent import LR, C, Descent, S

START = {LR: 0.032, S: 0.03125, C: 1.0}


def bowl(lr, s, c=1.0):
    """A loss with its least value at these rates; the matrices' rate lr·s counts more than lr."""
    least = {"matrices": math.log2(lr * s), "free": math.log2(lr * s * c), "others": math.log2(lr)}

    def loss(rates):
        matrices = math.log2(rates[LR] * rates[S])
        at = {"matrices": matrices, "free": matrices + math.log2(rates.get(C, 1.0)), "others": math.log2(rates[LR])}
        return 4 + sum(weight * (at[name] - least[name]) ** 2 for name, weight in
                       {"matrices": 0.03, "free": 0.05, "others": 0.01}.items())  # fmt: skip

    return loss


def test_the_start_is_the_first_trial_and_a_search_waits_for_what_it_must_know():
    losses = {}
    look = lambda rates: losses.get(tuple(rates.values()))  # noqa: E731
    first = Descent(START, 16, look)
    assert (first.tried, [first.rates(point) for point in first.pending]) == ({}, [START])
    losses[tuple(START.values())] = 4.0
    second = Descent(START, 16, look)
    assert [second.rates(point)[S] for point in second.pending] == [0.015625, 0.0625]
    assert [second.rates(point)[C] for point in second.pending] == [2, 0.5]
    assert second.best == (0, 0, 0)


FAR = [(0.032, 0.03125, 1.0), (0.064, 0.03125, 2.0), (0.008, 0.25, 0.5), (0.256, 0.125, 4.0)]


@pytest.mark.parametrize("least", FAR)
def test_it_finds_the_least_loss_however_far_and_says_that_it_is_inside(least):
    found = Descent(START, 60, bowl(*least))
    assert tuple(found.rates(found.best).values()) == pytest.approx(least)
    assert found.open_sides() == []
    assert found.pending == []


def test_steps_become_factors_of_the_root_of_two():
    found = Descent({LR: 0.032, S: 0.03125}, 60, bowl(0.032 * 2**1.5, 0.03125))
    assert found.rates(found.best) == {LR: 0.0905097, S: 0.03125}


def test_each_axis_moves_one_rate():
    found = Descent(START, 60, bowl(0.064, 0.03125, 0.5))
    for point in found.tried:
        rates = found.rates(point)
        at = rates[LR] * rates[S], rates[LR], rates[LR] * rates[S] * rates[C]
        expected = [rate * 2 ** (half / 2) for rate, half in zip((0.001, 0.032, 0.001), point, strict=True)]
        assert at == pytest.approx(expected, rel=1e-5)


def test_the_trials_are_the_limit_and_an_open_side_is_named():
    found = Descent(START, 4, bowl(1.024, 0.001 / 1.024))
    assert len(found.tried) == 4
    assert found.open_sides() == ["lr", "lr·s·c"]
    assert found.pending == []
    assert found.is_cut_off


def test_a_search_that_needed_all_its_trials_to_end_is_not_cut_off():
    needed = len(Descent(START, 60, bowl(0.032, 0.03125)).tried)
    assert not Descent(START, needed, bowl(0.032, 0.03125)).is_cut_off
    assert Descent(START, needed - 1, bowl(0.032, 0.03125)).is_cut_off


def test_a_diverged_trial_is_no_best_and_a_side_that_is_known():
    well = bowl(0.032, 0.03125)
    found = Descent(START, 60, lambda rates: math.inf if rates[LR] * rates[S] > 0.00101 else well(rates))
    assert found.rates(found.best) == pytest.approx(START)
    assert found.open_sides() == []


def test_a_search_asks_for_the_same_trials_whatever_it_knew_before():
    """Replayed trial by trial, it takes the way of the search that knows all losses."""
    whole = Descent(START, 16, bowl(0.1, 0.02, 3.0))
    known = {}
    look = lambda rates: known.get(str(rates))  # noqa: E731
    while (step := Descent(START, 16, look)).pending:
        for rates in map(step.rates, step.pending):
            known[str(rates)] = bowl(0.1, 0.02, 3.0)(rates)
    assert list(step.tried) == list(whole.tried)
    assert len(known) == 16
