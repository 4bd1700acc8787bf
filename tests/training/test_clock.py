import time

import pytest
import torch

from adafrugal.training.clock import PHASES, PhaseClock


def test_phases_add_up_and_can_be_told_apart():
    clock = PhaseClock(torch.device("cpu"))
    for _ in range(2):
        with clock("optimizer"):
            time.sleep(0.02)
    clock.move(0.01, "optimizer", "refresh")
    seconds = clock.take()
    assert tuple(seconds) == PHASES
    assert seconds["refresh"] == pytest.approx(0.01)
    assert 0.03 <= seconds["optimizer"] < 0.5
    assert seconds["forward"] == 0
    assert set(clock.take().values()) == {0.0}, "what was taken is gone"


def test_a_phase_within_another_is_counted_once():
    clock = PhaseClock(torch.device("cpu"))
    with clock("backward"):
        for _ in range(2):
            with clock("optimizer"):
                time.sleep(0.03)
            with pytest.raises(KeyError), clock("optimizer"):
                raise KeyError
    seconds = clock.take()
    assert 0.06 <= seconds["optimizer"] < 0.5
    assert 0 <= seconds["backward"] < 0.03


@pytest.mark.gpu
def test_on_a_gpu_phases_are_measured_there():
    clock = PhaseClock(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    with clock("forward"):
        for _ in range(50):
            a = a @ a
    assert clock.take()["forward"] > 0.001
    with clock("backward"), clock("optimizer"):
        for _ in range(50):
            a = a @ a
    seconds = clock.take()
    assert seconds["optimizer"] > 0.001
    assert seconds["backward"] < seconds["optimizer"] / 2
