import time

import pytest
import torch

from adafrugal.config import SettingError, Trainer
from adafrugal.training.clock import PHASES, PhaseClock
from adafrugal.training.devices import place


def test_phases_add_up_and_can_be_told_apart():
    clock = PhaseClock(torch.device("cpu"))
    for _ in range(2):
        with clock("optimizer"):
            time.sleep(0.02)
    clock.move(0.01, "optimizer", "refresh")
    seconds = clock.read()
    assert tuple(seconds) == PHASES
    assert seconds["refresh"] == pytest.approx(0.01)
    assert 0.03 <= seconds["optimizer"] < 0.5
    assert seconds["forward"] == 0


def test_a_phase_that_raises_is_still_an_exception():
    clock = PhaseClock(torch.device("cpu"))
    with pytest.raises(KeyError), clock("data"):
        raise KeyError


def test_more_than_one_process_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match=r"WORLD_SIZE is 2; allowed: 1"):
        place(Trainer())


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert place(Trainer(device="cpu")).precision == "fp32"
    with place(Trainer(device="cpu", precision="bf16")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(SettingError, match=r"trainer.device is cuda, but torch finds no GPU; allowed here: auto, cpu"):
        place(Trainer(device="cuda"))


@pytest.mark.gpu
def test_on_a_gpu_phases_are_measured_there():
    clock = PhaseClock(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    with clock("forward"):
        for _ in range(50):
            a = a @ a
    assert clock.read()["forward"] > 0.001
    assert place(Trainer()).precision in ("bf16", "fp32")
