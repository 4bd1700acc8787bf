"""The real train.py under the real torchrun, and what becomes of a run when one of its processes does not go on."""

import re
import signal
import subprocess
import sys
import time

import pytest
import torture
from conftest import REPOSITORY

from adafrugal.settings.schema import TrainerSettings
from adafrugal.system.errors import INTERRUPTED, TrainingError
from adafrugal.training.distributed import ranks
from adafrugal.training.distributed.ranks import Ranks

LONG = ["trainer.steps=30", "eval.every=1000", "trainer.log_every=2", "checkpoint.every=5", "optimizer.interval=50"]
DDP, FSDP = (["scale=smoke", "tracking=local", f"trainer.parallel={way}", *LONG] for way in ("ddp", "fsdp"))


def at_step(step, kind=signal.SIGKILL):
    """A signal to the last process."""
    return {"call": "adafrugal.training.loop:Loop._update", "n": step, "signal": kind}


@pytest.fixture
def pair(forks, tmp_path, cache_root):
    """A function that begins two processes of one run: words -> the two."""
    return lambda *words, kill=None: forks.ranks(
        2, f"run_root={tmp_path}", f"cache_root={cache_root}", *words, kill=kill
    )


def test_a_process_that_is_killed_ends_the_other_and_the_same_command_goes_on(pair, tmp_path):
    first, killed = pair(*DDP, kill=at_step(20))
    done = first.wait(60)
    assert (done.code, killed.wait().code) == (1, -signal.SIGKILL)
    waited = "process 0 of 2 waited at step 20 for the others until one of them was gone"
    said = re.search(rf"^error: ({waited}; last seen: process 1 at step 20, \d+ s ago; .*)$", done.err, re.MULTILINE)
    assert said, done.err
    record = torture.record_under(tmp_path)
    assert (record.status, record.reason) == ("failed", said[1])

    first, second = pair(*FSDP)  # the way is no part of what a run is
    done, silent = first.wait(), second.wait()
    assert (done.code, silent.code) == (0, 0), done.err
    assert "continuing after step 15" in done.out
    assert record.status == "finished"
    assert (done.out.count("record  "), silent.out) == (1, "")


def test_all_are_stopped_in_order_and_go_on(pair, tmp_path):
    codes = [process.wait(60).code for process in pair(*FSDP, kill=at_step(8, signal.SIGTERM))]
    assert codes == [INTERRUPTED] * 2
    assert torture.record_under(tmp_path).status == "interrupted"
    done, _ = [process.wait() for process in pair(*DDP, "trainer.steps=30")]
    assert done.code == 0, done.err
    assert "continuing after step 8" in done.out


def test_a_process_that_hangs_is_waited_for_so_long_and_no_longer(pair):
    first, hanging = pair(*DDP, "trainer.timeout=3", kill=at_step(5, signal.SIGSTOP))
    done = first.wait(60)
    hanging.send_signal(signal.SIGKILL)
    assert (done.code, hanging.wait().code) == (1, -signal.SIGKILL)
    waited = r"process 0 of 2 waited at step 5 for the others for 3 s \(trainer.timeout\)"
    assert re.search(rf"^error: {waited}; last seen: process 1 at step 5", done.err, re.MULTILINE), done.err


def test_a_run_of_several_does_not_begin_where_it_stands_in_anothers_way(pair, tmp_path):
    """The first process finds out; the other ends with it, and silently."""
    running = pair(*DDP, "trainer.steps=100000")
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("*/*/metrics.jsonl")):
            assert time.monotonic() < until
            time.sleep(0.1)
        first, second = (process.wait(60) for process in pair(*DDP, "trainer.steps=100000"))
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert re.fullmatch("error: .* is being written by another process; .*\n", first.err)
    assert (first.code, second.err) == (2, "")


def test_under_torchrun_what_is_wrong_for_all_is_said_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(REPOSITORY / "train.py"), *DDP, "trainer.batch_size=3", f"run_root={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: WORLD_SIZE is 2; allowed: a divisor of trainer.batch_size (3)"]


def test_a_wrong_setting_is_said_by_the_first_alone(forks):
    for rank, said in (("0", 1), ("1", 0)):
        done = forks("trainer.parallel=ddp", "optimizer.lr=-1", env={"WORLD_SIZE": "2", "RANK": rank})
        assert done.code == 2
        assert done.err.count("error: optimizer.lr is -1") == said


def test_one_process_needs_nobody():
    alone = Ranks()
    assert alone.first
    assert alone.sum([1.5, 2]) == [1.5, 2]
    assert alone.any([True, False]) == [True, False]
    assert alone.gather("x") == ["x"]
    assert alone.tell("x") == "x"
    alone.insist_alike(1)
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
    apart = "the processes have come apart at its start: the checksum of .* is not the same on all"
    with pytest.raises(TrainingError, match=rf"^{apart} \(0: this, 1: other\); the same command goes on"):
        two.insist_alike("this")


@pytest.mark.parametrize(("size", "rank", "first"), [(None, None, True), ("1", "3", True), ("2", "0", True),
                                                    ("2", "1", False)])  # fmt: skip
def test_the_first_is_told_by_its_environment(monkeypatch, size, rank, first):
    for name, value in (("WORLD_SIZE", size), ("RANK", rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ranks.is_first() is first
