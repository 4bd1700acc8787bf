import math

import pytest

from adafrugal.training.run import Run
from adafrugal.training.tasks.pretrain import Pretrain


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch):
    """A finished run's summary is without the estimate of its memory, which takes longer than these runs."""
    monkeypatch.setattr(Run, "_add_estimate", lambda run, summary: None)


@pytest.fixture
def poison(monkeypatch):
    """A function after which pre-training has losses at some steps that are no numbers: steps, kind -> None."""

    def make(*steps, kind=math.nan):
        work, loss, current = Pretrain.work, Pretrain.loss, []

        def poisoned(self, batch):
            return loss(self, batch) * (kind if self.model.training and current[-1] in steps else 1)

        monkeypatch.setattr(Pretrain, "work", lambda self, step: current.append(step) or work(self, step))
        monkeypatch.setattr(Pretrain, "loss", poisoned)

    return make
