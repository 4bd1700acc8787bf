"""W&B that cannot be reached, or never answers: the run does not wait long, and ends as without it."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPOSITORY
from torture import LONG, record_under

from adafrugal.tracking.wandb import SECONDS


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
def test_wandb_that_does_not_answer_stops_no_run(port, request, cache_root, tmp_path, tally):
    address = f"http://127.0.0.1:{request.getfixturevalue(port)}"
    command = [sys.executable, str(REPOSITORY / "train.py"), "scale=smoke", "tracking.mode=online", "eval.every=20",
               "optimizer=adamw", f"run_root={tmp_path}", f"cache_root={cache_root}"]  # fmt: skip
    begun = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 2 * SECONDS + 60
    assert done.stdout.count("W&B gets no copy of this run (") == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    record = record_under(tmp_path)
    assert (record.status, record.metrics()[-1]["step"]) == ("finished", 20)
    assert not any("0" * 40 in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    tally(f"faults: W&B behind a {port.replace('_', ' ')}")
