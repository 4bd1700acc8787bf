"""Density and interval at a step: formulas, states, and what is refused."""

import functools
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from own_parts import Trend
from stepping import frugal, matrices, saved_and_loaded, stepped

from adafrugal.optim import controls
from adafrugal.optim.controls import Constant, Control, Displacement, LinearDecay, LossAware


def test_linear_decay_is_the_formula_with_k_1_at_the_first_step():
    rho = LinearDecay(0.25, 0.05, steps=200_000)
    for k in (1, 2, 1000, 99_999, 200_000, 300_000):
        assert rho.at(k) == max(0.05, 0.25 - (0.25 - 0.05) * min(1, k / 200_000))
    assert rho.at(1) < 0.25
    assert rho.at(200_000) == rho.at(10**9) == 0.05


def test_interval_climbs_the_papers_ladder_with_half_to_even_rounding():
    ladder = [observed(LossAware(), *[5.0] * (1 + count)).at(1) for count in range(9)]
    assert ladder == [100, 150, 225, 338, 507, 760, 1000, 1000, 1000]


@pytest.mark.parametrize(
    ("before", "now", "settings", "grows"),
    [
        (2.0, 1.0, {"threshold": 0.51}, True),
        (1.0, 2.0, {"threshold": 0.51}, False),  # a change of 1 is all of the loss before
        (2.0, 1.0, {"threshold": 1.0 / (2.0 + 1e-9)}, False),  # equal to the threshold is not under it
        (4.0, 4.0, {"gate": 4.1}, True),
        (4.0, 4.0, {"gate": 4.0}, False),
        (9.0, 3.0, {"gate": 4.0}, False),  # and it never falls
        (-2.0, -1.0, {}, False),  # a log-likelihood of densities may be positive
        (-2.0, -2.001, {}, True),
        (0.0, 0.1, {}, False),
    ],
)
def test_the_change_is_relative_to_the_loss_before_and_both_bounds_are_strict(before, now, settings, grows):
    assert observed(LossAware(**settings), before, now).at(1) == (150 if grows else 100)


def test_a_small_interval_grows_too():
    ladder = [observed(LossAware(2, 6, factor=1.2), *[5.0] * (1 + count)).at(1) for count in range(7)]
    assert ladder == [2, 3, 4, 5, 6, 6, 6]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_no_interval_and_is_reported(loss):
    interval = observed(LossAware(), 5.0)
    with pytest.warns(UserWarning, match="interval stays 100"):
        interval.observe(loss)
    assert interval.at(1) == 100
    assert observed(interval, 5.0).at(1) == 150, "the loss before is the last finite one"


def test_a_period_lasts_until_a_check_finds_too_little_displacement_for_its_length():
    interval = Displacement(threshold=0.1, check=3, min=4, max=12)
    for moved, known in (([0.4], 7), ([0.4, 0.69], 7), ([2.0, 2.0], 10), ([2.0, 2.0, 2.0], 12), ([math.inf], 7)):
        interval.begin_period()
        for k in range(1, 13):
            if interval.decides_at(k):
                interval.decide(moved.pop(0) if moved else 0.0)
            if interval.at(1) <= k:
                break
        assert (interval.at(1), k) == (known, known) and not interval.decides_at(k + 1)


@pytest.mark.parametrize(("settings", "says"), [
    ({"threshold": 0}, "threshold is 0; a number above 0"), ({"check": 0}, "check is 0; a whole number of steps"),
    ({"min": 30, "max": 20}, "max is 20, below min"), ({"min": 2.5}, "min is 2.5; a whole number"),
])  # fmt: skip
def test_checks_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        controls.interval({"kind": "displacement"} | settings)


def observed(control, *losses):
    for loss in losses:
        control.observe(loss)
    return control


@pytest.mark.parametrize(
    "control", [Constant(0.25), LinearDecay(0.5, 0.1, 20), observed(LossAware(25, 250), 4.0, 4.0)], ids=str
)
def test_a_state_is_plain_and_comes_back_with_what_was_observed(control):
    state = json.loads(json.dumps(control.state_dict()))
    assert controls.restored(state, Constant(1)) == control
    assert (state.get("value"), state.get("last_loss")) in ((0.25, None), (None, None), (38, 4.0))


# -- controls of one's own --------------------------------------------------------------------------------------------


class Forgetful(Control):
    """No dataclass, so that its state would be lost."""

    kind = "forgetful"

    def __init__(self):
        self.value = 0.5

    def at(self, step):
        return self.value


class Late(Constant):
    """Keeps something that is no field, from its first loss on."""

    def observe(self, loss):
        self.seen = loss


@dataclass
class Tensors(Control):
    kind: ClassVar[str] = "tensors"
    losses: Any = field(init=False, default_factory=lambda: torch.zeros(3))

    def at(self, step):
        return 0.5


def test_a_control_of_ones_own_goes_on_with_what_it_observed():
    optimizer = stepped(frugal(matrices(), density=Trend(), subspace="columns", interval=2), range(3))
    for loss in (5.0, 4.0, 3.0):
        optimizer.observe(loss)
    saved = saved_and_loaded(optimizer)
    other = frugal(matrices(), density=Trend(), subspace="columns", interval=2)
    other.load_state_dict(saved)
    assert other.param_groups[0]["density"] == optimizer.param_groups[0]["density"]
    saved["param_groups"][0]["density"]["losses"].append(0.0)
    for each in (optimizer, other):
        each.observe(2.0)
        assert each.param_groups[0]["density"].state_dict()["losses"] == [3.0, 2.0]
    assert stepped(other, range(3, 6)).density == stepped(optimizer, range(3, 6)).density == 0.5 * 0.8 * 0.8


@pytest.mark.parametrize("build", [controls.density, controls.interval])
@pytest.mark.parametrize(
    ("control", "says"),
    [
        (
            Forgetful(),
            "Forgetful keeps 'value', which is no field of a dataclass and would not be saved: write @dataclass",
        ),
        (Tensors(), "Tensors.losses is a Tensor, which cannot be saved; allowed: numbers, strings"),
    ],
)
def test_a_control_that_would_not_be_saved_is_refused(control, says, build):
    with pytest.raises(ValueError, match=says):
        build(control)


def test_a_control_that_loses_something_later_is_not_saved_silently():
    optimizer = frugal(matrices(), density=Late(0.5))
    optimizer.state_dict()
    optimizer.observe(1.0)
    with pytest.raises(ValueError, match="Late keeps 'seen', which is no field"):
        optimizer.state_dict()


def test_a_state_from_before_a_setting_existed_is_read():
    state = LossAware(100, 1000).state_dict()
    del state["smoothing"], state["last_loss"]
    assert controls.restored(state, LossAware()).at(1) == 100


@pytest.mark.parametrize(
    ("build", "value", "says"),
    [
        (controls.density, 1.5, "value is 1.5; a density is a share"),
        (controls.density, -0.1, "from 0 to 1"),
        (controls.density, math.nan, "a number is needed"),
        (controls.density, "0.25", "a number is needed"),
        (controls.density, True, "a number is needed"),
        (controls.density, {"kind": "loss_aware"}, "allowed: constant, linear"),
        (controls.density, {"kind": "linear", "stop": 1}, "linear has no 'stop'; it has start, end, steps"),
        (controls.density, {"kind": "linear", "start": 0.1, "end": 0.2}, "a decay falls"),
        (controls.density, {"kind": "constant"}, "constant needs value"),
        (controls.interval, 0, "at least 1"),
        (controls.interval, 2.5, "a whole number"),
        (controls.interval, {"kind": "loss_aware", "start": 10, "max": 5}, "only grows"),
        (controls.interval, {"kind": "loss_aware", "factor": 1.0}, "above 1"),
        (controls.interval, {"kind": "linear"}, "allowed: constant, loss_aware"),
        (controls.interval, {"kind": "loss_aware", "value": 400}, "has no 'value'; it has start, max"),
        (controls.interval, {"kind": ["loss_aware"]}, "allowed: constant, loss_aware"),
        (controls.interval, {"kind": "loss_aware", "source": "test"}, "source is 'test'; allowed: validation"),
        (controls.interval, {"kind": "loss_aware", "smoothing": 1.0}, "smoothing is 1.0"),
        (controls.interval, {"kind": "loss_aware", "smoothing": -0.1}, "smoothing is -0.1"),
        (controls.interval, LinearDecay(), "kind is 'linear'; allowed here: constant, loss_aware"),
        (controls.density, LossAware(), "kind is 'loss_aware'; allowed here: constant, linear"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(build, value, says):
    with pytest.raises(ValueError, match=says):
        build(value)


def test_a_cosine_falls_from_start_to_end_and_stays():
    decay = controls.density({"kind": "cosine", "start": 0.3, "end": 0.1, "steps": 8})
    assert decay.at(4) == pytest.approx(0.2)
    assert decay.at(2) == pytest.approx(0.1 + 0.2 * (1 + 2**-0.5) / 2)
    assert [decay.at(k) for k in (8, 9, 100)] == [0.1] * 3


def test_a_smoothed_loss_settles_where_a_noisy_one_does_not():
    noisy = [4.0 + 0.1 * (-1) ** i for i in range(40)]  # changes by 5% from one to the next
    plain, smooth = (observed(LossAware(100, 1000, smoothing=beta), *noisy) for beta in (0.0, 0.95))
    assert plain.at(1) == 100
    assert smooth.at(1) == 1000
    assert smooth.last_loss == pytest.approx(functools.reduce(lambda mean, loss: 0.95 * mean + 0.05 * loss, noisy))
