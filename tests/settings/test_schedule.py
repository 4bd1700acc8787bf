import math

import pytest

from adafrugal.settings.schedule import factor
from adafrugal.settings.schedule_settings import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    RestartingSchedule,
    WsdSchedule,
)


def test_cosine_with_restarts_is_the_papers_formula():
    at = factor(RestartingSchedule(warmup=1000, cycle=10_000, floor=0.1), steps=200_000)
    for step in (0, 1, 500, 999, 1000, 1001, 5500, 9999, 10_000, 10_500, 11_000, 199_999):
        c = step % 10_000
        expected = c / 1000 if c < 1000 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (c - 1000) / 9000))
        assert at(step) == pytest.approx(expected, abs=1e-15)
    assert at(0) == at(10_000) == 0


@pytest.mark.parametrize("schedule", [CosineSchedule(floor=0.1), LinearSchedule(floor=0.1), ConstantSchedule()])
def test_all_warm_up_over_a_tenth_and_end_at_their_floor(schedule):
    at = factor(schedule, steps=100)
    assert [at(t) for t in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    last = 1.0 if schedule.kind == "constant" else 0.1
    assert at(100) == at(500) == pytest.approx(last), "steps beyond the run stay at the end"
    values = [at(t) for t in range(10, 101)]
    assert values == sorted(values, reverse=True)
    assert values[45] == pytest.approx((1 + last) / 2), "halfway between warm-up and end"


@pytest.mark.parametrize(("cooldown", "steps"), [(None, 20), (0.3, 30), (40, 40), (0.001, 1)])
def test_wsd_is_the_constant_schedule_until_its_cooldown(cooldown, steps):
    at, constant = factor(WsdSchedule(cooldown=cooldown, floor=0.1), steps=100), factor(ConstantSchedule(), steps=100)
    begin = 100 - steps
    assert [at(t) for t in range(begin + 1)] == [constant(t) for t in range(begin + 1)]
    falling = [at(begin + i) for i in range(steps + 1)]
    assert falling == pytest.approx([1 - 0.9 * i / steps for i in range(steps + 1)])
    assert at(500) == pytest.approx(0.1)
