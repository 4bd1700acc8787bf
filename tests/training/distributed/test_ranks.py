"""The real train.py under the real torchrun, and what becomes of a run when one of its processes does not go on."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torture
from conftest import REPOSITORY

from adafrugal.settings.schema import TrainerSettings
from adafrugal.system.errors import TrainingError
from adafrugal.training.distributed import ranks
from adafrugal.training.distributed.ranks import Ranks

LONG = ["trainer.steps=30", "eval.every=1000", "trainer.log_every=2", "checkpoint.every=5", "optimizer.interval=50"]


@pytest.fixture
def torchrun(tmp_path, cache_root):
    """A function that starts train.py on two processes: words -> a process, which writes to files."""
    started = []

    def begin(*words, size=2):
        places = ["scale=smoke", "tracking=local", f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command += [str(REPOSITORY / "train.py"), *places, *words]
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            process = subprocess.Popen(
                command, stdout=out, stderr=err, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        started.append(process)
        return process

    begin.out, begin.err = (lambda: (tmp_path / "out").read_text()), (lambda: (tmp_path / "err").read_text())
    begin.status = lambda: json.loads(next(tmp_path.glob("runs/*/*/status.json")).read_text())
    yield begin
    for process in started:
        for one in (*children(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()


def children(pid):
    """The processes that torchrun started, by rank."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def trained(begin, tmp_path, step):
    def holds():
        lines = [file.read_text() for file in tmp_path.glob("runs/*/*/metrics.jsonl")]
        return any(f'"step": {step}' in text for text in lines)

    until(lambda: holds() or begin_ended(begin))


def begin_ended(process):
    assert process.poll() is None, "it ended"
    return False


@pytest.fixture
def pair(forks, tmp_path, cache_root):
    """A function that begins two processes of one run, with the environment that torchrun gives: words -> the two."""

    def begin(*words, kill=None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        words = ["scale=smoke", "tracking=local", f"run_root={tmp_path}", f"cache_root={cache_root}", *words]
        ours = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environments = [ours | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return [forks.begin(*words, env=env, kill=kill if env["RANK"] == "1" else None) for env in environments]

    return begin


def test_a_process_that_is_killed_ends_the_other_and_the_same_command_goes_on(pair, tmp_path):
    at_step_20 = {"call": "adafrugal.training.loop:Loop._update", "n": 20}
    first, killed = pair("trainer.parallel=ddp", *LONG, kill=at_step_20)
    done = first.wait(60)
    assert (done.code, killed.wait().code) == (1, -signal.SIGKILL)
    waited = "process 0 of 2 waited at step 20 for the others until one of them was gone"
    said = re.search(rf"^error: ({waited}; last seen: process 1 at step 20, \d+ s ago; .*)$", done.err, re.MULTILINE)
    assert said, done.err
    record = torture.record_under(tmp_path)
    assert (record.status, record.reason) == ("failed", said[1])

    first, second = pair("trainer.parallel=fsdp", *LONG)  # the way is no part of what a run is
    done, silent = first.wait(), second.wait()
    assert (done.code, silent.code) == (0, 0), done.err
    assert "continuing after step 15" in done.out
    assert record.status == "finished"
    assert (done.out.count("record  "), silent.out) == (1, "")


@pytest.mark.skipif(not torture.LONG, reason="make torture: test_launchers stops several, too")
def test_all_are_stopped_in_order_and_go_on(torchrun, tmp_path):
    process = torchrun("trainer.parallel=fsdp", *LONG, "trainer.steps=1000")
    trained(process, tmp_path, 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    assert torchrun.status()["status"] == "interrupted"
    step = torchrun.status()["step"]
    again = torchrun("trainer.parallel=ddp", *LONG, "trainer.steps=1000")
    assert again.wait(120) == 0, torchrun.err()
    assert f"continuing after step {step}" in torchrun.out()


def test_a_process_that_hangs_is_waited_for_so_long_and_no_longer(torchrun, tmp_path):
    process = torchrun("trainer.parallel=ddp", "trainer.timeout=3", *LONG, "trainer.steps=1000")
    trained(process, tmp_path, 10)
    hanging = children(process.pid)[1]
    os.kill(hanging, signal.SIGSTOP)
    until(lambda: "error: " in torchrun.err(), 20)
    os.kill(hanging, signal.SIGKILL)
    assert process.wait(30) == 1
    waited = r"process 0 of 2 waited at step \d+ for the others for 3 s \(trainer.timeout\)"
    assert re.search(rf"^error: {waited}; last seen: process 1 at step \d+", torchrun.err(), re.MULTILINE)


def test_what_is_wrong_for_all_is_said_once(torchrun):
    process = torchrun("trainer.parallel=ddp", "trainer.batch_size=3")
    assert process.wait(60) == 1
    lines = [line for line in torchrun.err().splitlines() if line.startswith("error: ")]
    assert lines == ["error: WORLD_SIZE is 2; allowed: a divisor of trainer.batch_size (3)"]


def test_a_wrong_setting_is_said_by_the_first_alone(forks):
    for rank, said in (("0", 1), ("1", 0)):
        done = forks("trainer.parallel=ddp", "optimizer.lr=-1", env={"WORLD_SIZE": "2", "RANK": rank})
        assert done.code == 2
        assert done.err.count("error: optimizer.lr is -1") == said


@pytest.mark.skipif(not torture.LONG, reason="make torture")
def test_a_run_of_several_does_not_begin_where_it_stands_in_anothers_way(torchrun, tmp_path):
    """The first process finds out; the other ends with it, and silently."""
    torchrun("trainer.parallel=ddp", *LONG, "trainer.steps=100000")
    until(lambda: list(tmp_path.glob("runs/*/*/metrics.jsonl")))
    err = tmp_path / "err"
    err.rename(tmp_path / "first's")
    second = torchrun("trainer.parallel=ddp", *LONG, "trainer.steps=100000")
    assert second.wait(60) == 1
    lines = [line for line in torchrun.err().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "is being written by another process" in lines[0]


def test_one_process_needs_nobody():
    alone = Ranks()
    assert alone.first
    assert alone.sum([1.5, 2]) == [1.5, 2]
    assert alone.any([True, False]) == [True, False]
    assert alone.gather("x") == ["x"]
    assert alone.tell("x") == "x"
    alone.insist_alike(1, "a number")
    with alone.first_goes_first():
        pass
    assert alone.lost(RuntimeError("gloo: timed out")) is None
    alone.join(TrainerSettings())
    alone.leave()


def test_an_error_of_ones_own_is_not_taken_for_another_ones_end():
    two = Ranks(0, 2)
    two._store = object()
    for error in (TrainingError("the checkpoint cannot be written: Connection timed out"), ValueError("gloo")):
        assert two.lost(error) is None


def test_a_store_that_nobody_keeps_is_told_in_a_line(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    settings = TrainerSettings(parallel="ddp", timeout=1.0)
    with pytest.raises(TrainingError, match=r"^process 1 of 2 does not reach the others: "):
        Ranks.of_environment(settings).join(settings)


def test_processes_that_have_come_apart_do_not_go_on(monkeypatch):
    two = Ranks(0, 2)
    monkeypatch.setattr(two, "gather", lambda value: [value, "other"])
    apart = "the processes have come apart at its start: the checksum is not the same on all"
    with pytest.raises(TrainingError, match=rf"^{apart} \(0: this, 1: other\); the same command goes on"):
        two.insist_alike("this", "the checksum")


@pytest.mark.parametrize(("size", "rank", "first"), [(None, None, True), ("1", "3", True), ("2", "0", True),
                                                    ("2", "1", False)])  # fmt: skip
def test_the_first_is_told_by_its_environment(monkeypatch, size, rank, first):
    for name, value in (("WORLD_SIZE", size), ("RANK", rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ranks.is_first() is first
