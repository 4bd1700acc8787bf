import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest

from adafrugal.data.text import embedded
from adafrugal.system import processes
from adafrugal.system.signals import ASKED_BY


def main(pipe):
    """A helper: signals itself, then answers with its parent."""
    processes.end_with_parent()
    for number in ASKED_BY:
        os.kill(os.getpid(), number)
    pipe.send((os.getppid(), pipe.recv()))
    pipe.poll(None)
    sys.exit(3)


def signal_itself(file):
    for number in ASKED_BY:
        os.kill(os.getpid(), number)
    return [f"docstring of {file}" * embedded.SHORTEST]


@pytest.fixture
def helper(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = processes.Helper(__name__)
    yield found
    found.pipe.close()
    found.end(5)


def test_a_helper_answers_over_its_pipe_and_leaves_signals_to_its_parent(helper):
    helper.pipe.send("a word")
    assert helper.pipe.recv() == (os.getpid(), "a word")
    helper.pipe.close()
    assert helper.end(5) == 3


def test_a_helper_that_does_not_end_is_killed(helper):
    assert helper.end(0) is None
    assert helper.process.returncode == -signal.SIGKILL


def test_workers_that_read_the_embedded_text_leave_signals_to_their_parent(monkeypatch):
    """Slurm sends SIGUSR1 and SIGUSR2 to all processes of a job's step."""
    monkeypatch.setattr(embedded, "PACKAGES", ("json",))
    monkeypatch.setattr(embedded, "_docstrings", signal_itself)
    embedded.read()  # raises BrokenProcessPool where a worker is gone


def test_a_helper_ends_after_its_parent(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    code = (
        "import os, test_processes; from adafrugal.system import processes\n"
        "print(processes.Helper('test_processes').process.pid, flush=True); os._exit(0)"
    )
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    helper, end = Path(f"/proc/{found.stdout.strip()}"), time.monotonic() + 20
    while helper.exists() and "zombie" not in (helper / "status").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_end_of_a_pipe_is_noticed_before_the_grace_is_over(monkeypatch):
    ended, gone = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(processes, "_parent", os.getppid())
    ours, theirs = Pipe()
    processes.end_with_parent(0.2, theirs, gone)
    assert not gone.is_set()
    ours.close()
    assert gone.wait(5)
    assert ended.wait(5)
