import contextlib
import os
import signal

import pytest

from adafrugal.settings.identity import identify
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record
from adafrugal.training import session


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_before_training_a_signal_stops_at_once_and_is_remembered(number):
    with Stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert stop.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_in_training_the_first_signal_asks_and_the_second_insists(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        stop.training = True
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def status_after(set_up, raised, settings, monkeypatch):
    """What a record says of a run that is set up so, and ends with that exception."""
    monkeypatch.setattr(session.Session, "_set_up", set_up)
    chosen, choices = settings()
    with pytest.raises(raised):
        session.run(chosen, choices)
    return Record(identify(chosen, choices).directory).status


def test_an_interruption_that_an_import_swallowed_is_one_all_the_same(settings, monkeypatch):
    """What was imported by half fails later, with an error of its own."""

    def set_up(self, display, ends, place):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        raise ImportError("half imported")

    assert status_after(set_up, KeyboardInterrupt, settings, monkeypatch) == "interrupted"


@pytest.mark.parametrize(("error", "waits"), [(None, True), (ValueError, True), (KeyboardInterrupt, False)])
def test_a_process_that_is_stopped_at_once_waits_for_nothing(error, waits):
    waited = []
    with contextlib.suppress(ValueError, KeyboardInterrupt), contextlib.ExitStack() as ends:
        ends.push(session._unless_at_once(lambda: waited.append(True)))
        if error:
            raise error
    assert bool(waited) is waits


def test_how_it_ended_is_noted_before_anything_is_waited_for(settings, monkeypatch):
    """A scheduler that asked may kill the process in the meantime."""
    found = []

    def set_up(self, display, ends, place):
        ends.callback(lambda: found.append(self.record.status))
        raise ImportError("missing")

    assert status_after(set_up, ImportError, settings, monkeypatch) == "failed"
    assert found == ["failed"]


def test_an_error_without_an_interruption_is_a_failure(settings, monkeypatch):
    def set_up(self, display, ends, place):
        raise ImportError("missing")

    assert status_after(set_up, ImportError, settings, monkeypatch) == "failed"
