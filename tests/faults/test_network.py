"""W&B that cannot be reached, or never answers: the run does not wait long, and ends as without it."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from torture import LONG, record_under

from adafrugal.tracking.copying import SECONDS


@pytest.fixture
def silent_port():
    """A server that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def take():
            try:
                while True:
                    taken.append(server.accept())
            except OSError:  # closed
                return

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1]
    for connection, _ in taken:
        connection.close()


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("port", ["closed_port", *(["silent_port"] if LONG else [])])
def test_wandb_that_does_not_answer_stops_no_run(port, request, forks, cache_root, tmp_path, tally):
    address = f"http://127.0.0.1:{request.getfixturevalue(port)}"
    words = ["scale=smoke", "tracking.mode=online", "eval.every=20", "optimizer=adamw", f"run_root={tmp_path}"]
    key = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
    done = forks(*words, f"cache_root={cache_root}", cwd=tmp_path, env=key, timeout=300)
    assert done.code == 0, done.err
    assert done.seconds < 2 * SECONDS + 60
    assert done.out.count("W&B gets no copy of this run (") == 1, done.out + done.err
    assert "Traceback" not in done.out + done.err
    record = record_under(tmp_path)
    assert (record.status, record.metrics()[-1]["step"]) == ("finished", 20)
    assert not any("0" * 40 in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    tally(f"faults: W&B behind a {port.replace('_', ' ')}")


@pytest.mark.parametrize("who", ["adafrugal.tracking.wandb", "wandb-core"] if LONG else [])
def test_wandb_that_stands_still_stops_no_run(who, forks, cache_root, tmp_path, tally):
    """The copy's process, or W&B's own behind it, from the first step on: as for a network that swallows all."""
    words = ["scale=smoke", "trainer.steps=200", "eval.every=200", "optimizer=adamw", f"run_root={tmp_path}"]
    process = forks.begin(*words, f"cache_root={cache_root}", cwd=tmp_path)
    until, found = time.monotonic() + 120, []
    while not found and time.monotonic() < until:
        found = list(_called(who, tmp_path))
        time.sleep(0.01)
    os.kill(found[0], signal.SIGSTOP)
    begun = time.monotonic()
    try:
        done = process.wait(SECONDS + 200)
    finally:
        with suppress(ProcessLookupError):  # the run has ended it
            os.kill(found[0], signal.SIGKILL)
    assert done.code == 0, done.err
    assert time.monotonic() - begun < SECONDS + 120
    assert done.out.count("W&B gets no copy of this run (") == 1, done.out
    assert "Traceback" not in done.out + done.err
    assert record_under(tmp_path).status == "finished"
    tally("faults: W&B stands still")


def _called(name, place):
    """The processes in a directory whose command has a name in it."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if name.encode() in file.read_bytes() and (file.parent / "cwd").readlink() == place:
                yield int(file.parent.name)
