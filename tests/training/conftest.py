import pytest

from adafrugal.training.run import Run


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch):
    """A finished run's summary is without the estimate of its memory, which takes longer than these runs."""
    monkeypatch.setattr(Run, "_add_estimate", lambda run, summary: None)
