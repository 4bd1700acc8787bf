"""A run that is killed, at any instant, and typed again ends as one that is not."""

import random
import signal
import time

import pytest
from torture import FEWER, LONG, end_of, record_under

# four micro-batches a step, a refresh every third, ρ falls, T moves, three checkpoints and a best one
ADAFRUGAL = ["scale=smoke", "tracking=local", "trainer.micro_batch_size=2", "checkpoint.every=6", "checkpoint.keep=2",
             "eval.every=8", "optimizer.interval.start=3", "optimizer.interval.every=5",
             "optimizer.interval.threshold=0.9", "optimizer.interval.gate=100"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(forks, cache_root, once):
    """An undisturbed run: its end, and how many files it touches."""

    def make(shared):
        roots, words = [shared / "whole", shared / "again"], [*ADAFRUGAL, f"cache_root={cache_root}"]
        done, again = (forks(*words, f"run_root={root}", kill={"file": 0}) for root in roots)
        assert done.code == again.code == 0, done.err
        assert end_of(roots[0]) == end_of(roots[1]), "what is compared does not change by itself"
        return end_of(roots[0]), done.files

    return once("killed", make)


@pytest.fixture
def survives(forks, cache_root, tmp_path, whole):
    """A function that kills a run once and types it again."""

    def check(kill):
        words = [*ADAFRUGAL, f"run_root={tmp_path}", f"cache_root={cache_root}"]
        killed = forks(*words, kill=kill)
        if killed.code == 0 and killed.files < kill.get("file", 0):  # runs differ by one or two
            pytest.skip(FEWER)
        assert killed.code == -signal.SIGKILL, killed
        again = forks(*words)
        assert again.code == 0, again.err
        assert "Traceback" not in again.err
        assert end_of(tmp_path) == whole[0]
        steps = [line["step"] for line in record_under(tmp_path).metrics()]
        assert steps == sorted(set(steps))
        left = [path.name for path in tmp_path.rglob(".*") if path.name.endswith((".new", ".damaged"))]
        assert left == []

    return check


@pytest.mark.parametrize("part", range(360 if LONG else 3))
def test_when_it_touches_a_file(part, whole, survives, tally):
    """Between any two files of a checkpoint, of the record, in the middle of removing an old one, …"""
    files = whole[1]
    assert 40 < files <= 360
    n = part + 1 if LONG else round((part + 0.5) * files / 3)
    if n > files:
        pytest.skip(FEWER)
    survives({"file": n})
    tally("instants: a file of the run is touched")


LOSS = "adafrugal.training.tasks.pretrain:Pretrain.loss"
CALLS = [
    (LOSS, 1), (LOSS, 4 * 7 + 3), (LOSS, 4 * 20 + 1),  # within accumulation and evaluations
    ("adafrugal.training.tasks.pretrain:Pretrain.evaluate", 3),
    ("adafrugal.optim.frugal:Frugal.step", 3), ("adafrugal.optim.frugal:Frugal.step", 4),  # before and after a refresh
    ("adafrugal.optim.frugal:Frugal.observe", 2), ("adafrugal.training.loop:Loop.resume", 1),
    ("adafrugal.training.checkpoints.checkpoint:_digest", 2), ("os:fsync", 7), ("torch:save", 2),
]  # fmt: skip


@pytest.mark.parametrize(("call", "n"), CALLS[:: 1 if LONG else 4])
def test_in_the_middle_of_a_call(call, n, survives, forks, cache_root, tmp_path, tally):
    if call.endswith("Loop.resume"):  # which only a second start comes to
        forks(*ADAFRUGAL, f"run_root={tmp_path}", f"cache_root={cache_root}", kill={"call": LOSS, "n": 60})
    survives({"call": call, "n": n})
    tally("instants: in the middle of a call")


@pytest.mark.parametrize("seed", range(10) if LONG else [11])  # of which all three instants are of the training
def test_at_random_instants(seed, forks, cache_root, tmp_path, tally):
    """Three times in a row, from outside."""
    chosen = random.Random(seed)
    words = [*ADAFRUGAL, f"trainer.steps={200 if LONG else 120}", "trainer.log_every=2", "checkpoint.every=4",
             f"cache_root={cache_root}"]  # fmt: skip

    def end(name):
        done = forks(*words, f"run_root={tmp_path / name}")
        assert done.code == 0, done.err
        return end_of(tmp_path / name)

    for _ in range(3):
        process = forks.begin(*words, f"run_root={tmp_path / 'killed'}")
        if chosen.random() < 0.2:  # most instants are of the training, few of what comes before it
            time.sleep(chosen.uniform(0, 3))
        else:
            _await_steps(tmp_path / "killed", chosen.randint(0, 30))
            time.sleep(chosen.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL, "it was done before"
        tally("instants: at random, from outside")
    assert end("killed") == end("whole")


def _await_steps(root, more):
    """Until the newest start of a run has made more steps than so many."""
    until, starts = time.monotonic() + 120, _lines(root, "events.jsonl").count(b'"event": "start"')
    while time.monotonic() < until and _lines(root, "events.jsonl").count(b'"event": "start"') == starts:
        time.sleep(0.005)
    begun = _lines(root, "metrics.jsonl").count(b"\n")
    while time.monotonic() < until and 2 * (_lines(root, "metrics.jsonl").count(b"\n") - begun) < more:
        time.sleep(0.005)


def _lines(root, name):
    return b"".join(file.read_bytes() for file in root.glob(f"*/*/{name}"))


def test_a_second_signal_in_the_middle_of_a_checkpoint(forks, cache_root, tmp_path, tally):
    """Where nearly all the time is spent writing them, in a thread that nobody waits for then."""
    words = ["scale=smoke", "model.hidden_size=256", "model.intermediate_size=1024", "model.num_hidden_layers=4",
             "tracking=local", "optimizer=adamw", "trainer.steps=3000", "trainer.sequence_length=16",
             "checkpoint.every=1", "eval.every=3000", "eval.tokens=64", f"run_root={tmp_path}",
             f"cache_root={cache_root}"]  # fmt: skip
    for times in range(3 if LONG else 1):
        until, before = time.monotonic() + 120, _checkpoints(tmp_path)
        process = forks.begin(*words)
        while _checkpoints(tmp_path) <= before and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02 * (times + 1))
        process.send_signal(signal.SIGTERM)
        done = process.wait(60)
        assert (done.code, done.err.count("\n")) == (75, 2), done.err
        assert record_under(tmp_path).status == "interrupted"
        tally("faults: a second signal")


def _checkpoints(root):
    """The newest that is whole; 0 for none."""
    return max((int(place.name.removeprefix("step-")) for place in root.glob("*/*/checkpoints/step-*")), default=0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM] if LONG else [signal.SIGUSR1])
def test_a_second_signal_stops_at_once_and_nothing_is_lost(number, forks, cache_root, tmp_path, tally):
    """Where the step in hand takes long: one over many rows."""
    words = [*ADAFRUGAL, "trainer.steps=3", f"trainer.batch_size={512 if LONG else 256}", "checkpoint.every=1",
             "eval.every=3", "optimizer.interval=50", f"run_root={tmp_path}", f"cache_root={cache_root}"]  # fmt: skip
    process = forks.begin(*words)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("*/*/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    time.sleep(0.1)
    asked = time.monotonic()
    process.send_signal(number)
    done = process.wait(60)
    assert time.monotonic() - asked < 5
    assert done.code == 75
    assert done.err.splitlines() == [
        "stopping after this step; a second signal stops at once", "interrupted; the same command continues"
    ]  # fmt: skip
    assert record_under(tmp_path).status == "interrupted"
    again = forks(*words)
    assert again.code == 0, again.err
    assert "continuing after step" in again.out
    tally("faults: a second signal")
