import json
import math

import pytest

from adafrugal.optim import controls
from adafrugal.optim.controls import Constant, LinearDecay, LossAware


def test_linear_decay_is_the_formula_with_k_1_at_the_first_step():
    rho = LinearDecay(0.25, 0.05, steps=200_000)
    for k in (1, 2, 1000, 99_999, 200_000, 300_000):
        assert rho.at(k) == max(0.05, 0.25 - (0.25 - 0.05) * min(1, k / 200_000))
    assert rho.at(1) < 0.25
    assert rho.at(200_000) == rho.at(10**9) == 0.05


def test_interval_climbs_the_papers_ladder_with_half_to_even_rounding():
    interval = LossAware()
    interval.observe(5.0)
    ladder = [interval.at(1)]
    for _ in range(8):
        interval.observe(5.0)
        ladder.append(interval.at(1))
    assert ladder == [100, 150, 225, 338, 507, 760, 1000, 1000, 1000]


def test_the_change_is_relative_to_the_loss_before_and_both_bounds_are_strict():
    def grown(before, now, **settings):
        interval = LossAware(**settings)
        interval.observe(before)
        interval.observe(now)
        return interval.at(1) > 100

    assert grown(2.0, 1.0, threshold=0.51)
    assert not grown(1.0, 2.0, threshold=0.51), "a change of 1 is all of the loss before"
    assert not grown(2.0, 1.0, threshold=1.0 / (2.0 + 1e-9)), "equal to the threshold is not under it"
    assert grown(4.0, 4.0, gate=4.1)
    assert not grown(4.0, 4.0, gate=4.0)


def test_interval_never_falls_and_the_gate_holds_it():
    interval = LossAware(gate=4.0)
    for loss in (5.0, 5.0, 9.0, 3.0):
        interval.observe(loss)
        assert interval.at(1) == 100
    interval.observe(3.0)
    assert interval.at(1) == 150


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_no_interval_and_is_reported(loss):
    interval = LossAware()
    interval.observe(5.0)
    with pytest.warns(UserWarning, match="interval stays 100"):
        interval.observe(loss)
    assert interval.at(1) == 100
    interval.observe(5.0)
    assert interval.at(1) == 150, "the loss before is the last finite one"


@pytest.mark.parametrize("control", [Constant(0.25), LinearDecay(0.5, 0.1, 20)])
def test_density_state_is_plain_and_comes_back(control):
    state = json.loads(json.dumps(control.state_dict()))
    assert controls.density(state) == controls.restored(state, Constant(1)) == control


def test_interval_state_comes_back_with_what_it_observed():
    control = LossAware(25, 250)
    for loss in (4.0, 4.0):
        control.observe(loss)
    again = controls.restored(json.loads(json.dumps(control.state_dict())), LossAware())
    assert again == control
    assert (again.value, again.last_loss) == (38, 4.0)


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
        (
            controls.interval,
            {"kind": "loss_aware", "source": "test"},
            "source is 'test'; allowed: validation",
        ),
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
    values = [decay.at(k) for k in range(9)]
    assert values == sorted(values, reverse=True)


def test_a_smoothed_loss_settles_where_a_noisy_one_does_not():
    noisy = [4.0 + 0.1 * (-1) ** i for i in range(40)]  # changes by 5% from one to the next
    plain, smooth = (LossAware(100, 1000, smoothing=beta) for beta in (0.0, 0.95))
    for loss in noisy:
        plain.observe(loss)
        smooth.observe(loss)
    assert plain.at(1) == 100
    assert smooth.at(1) == 1000
    assert smooth.last_loss == pytest.approx(0.95 * last(noisy[:-1], 0.95) + 0.05 * noisy[-1])


def last(losses, beta):
    mean = losses[0]
    for loss in losses[1:]:
        mean = beta * mean + (1 - beta) * loss
    return mean


def test_a_state_from_before_a_setting_existed_is_read():
    state = LossAware(100, 1000).state_dict()
    del state["smoothing"], state["last_loss"]
    assert controls.restored(state, LossAware()).at(1) == 100
