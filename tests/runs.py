"""Fixtures for tests of runs in this process."""

import math

import pytest


@pytest.fixture
def no_estimate(monkeypatch):
    """A finished run's summary is without the estimate of its memory, which takes longer than these runs."""
    from adafrugal.training.run import Run

    monkeypatch.setattr(Run, "_add_estimate", lambda run, summary: None)


@pytest.fixture
def poison(monkeypatch):
    """A function after which pre-training has losses at some steps that are no numbers: steps, kind -> None."""
    from adafrugal.training.tasks.pretrain import Pretrain

    def make(*steps, kind=math.nan):
        work, loss, current = Pretrain.work, Pretrain.loss, []

        def poisoned(self, batch):
            return loss(self, batch) * (kind if self.model.training and current[-1] in steps else 1)

        monkeypatch.setattr(Pretrain, "work", lambda self, step: current.append(step) or work(self, step))
        monkeypatch.setattr(Pretrain, "loss", poisoned)

    return make
