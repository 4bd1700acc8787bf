import importlib
import os
import signal
import time

import pytest

from adafrugal.system.signals import ASKED_BY, Stop


@pytest.mark.parametrize("number", ASKED_BY)
def test_before_training_a_signal_stops_at_once_and_in_it_the_second_does(number):
    before = signal.getsignal(number)
    for training in (False, True):
        with Stop() as stop:
            stop.training = training
            if training:
                os.kill(os.getpid(), number)
                assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            assert stop.requested
            assert stop.was_lost is not training
    assert signal.getsignal(number) is before


def test_a_signal_within_an_import_waits_for_its_end(tmp_path, monkeypatch):
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nis_whole = True\n"
    (tmp_path / "interrupted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with Stop() as stop, pytest.raises(KeyboardInterrupt):
        assert importlib.import_module("interrupted").is_whole
        assert stop.requested
        time.sleep(10)
