"""The real train.py on text from files: resuming, running out of text, missing and broken input, a full disk."""

import random
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from corpora import zipped
from torture import LONG

from adafrugal.data.text import sources
from adafrugal.tracking.record import Record

OWN = ["data=c4", "data.tokenizer.kind=train", "data.tokenizer.name=null", "eval.tokens=500", "data.processes=1"]
TIMED = ("seconds", "elapsed", "tokens_per_second", "memory", "time")


@pytest.fixture
def run(train, c4_layout):
    """A function that makes a tiny run on `c4_layout`: settings -> the finished process."""
    return lambda *settings, **how: train(*OWN, f"data.source={c4_layout}", *settings, **how)


def record(tmp_path, arm="adafrugal"):
    (found,) = (tmp_path / "runs").glob(f"*/{arm}-*")
    return Record(found)


def curve(found):
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found.metrics()]


def keep_files(c4_layout, count):
    """Remove all training files but the first ones and the last."""
    for file in sorted((c4_layout / "en").glob("c4-train*"))[count - 1 : -1]:
        file.unlink()


def test_a_run_interrupted_twice_ends_as_an_uninterrupted_one_bit_for_bit(forks, c4_layout, cache_root, tmp_path):
    """Over windows and epochs."""
    keep_files(c4_layout, 2)
    settings = ["trainer.steps=36", "data.window_tokens=2048", "data.repeat=true", "eval.every=36"]
    settings += ["optimizer.interval.every=18", "checkpoint.every=1000", "trainer.log_every=2"]
    words = ["scale=smoke", "tracking=local", f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}", *OWN]
    words += [f"data.source={c4_layout}", *settings]
    stop = {"call": "adafrugal.data.batches:Prefetched.__call__", "n": 12, "signal": signal.SIGTERM}
    runs = [("whole", None), *[("halves", stop)] * 2, ("halves", None)]
    assert [forks(*words, f"arm={arm}", kill=kill).code for arm, kill in runs] == [0, 75, 75, 0]
    whole, halves = record(tmp_path, "whole"), record(tmp_path, "halves")
    assert [event["step"] for event in halves.events() if event["event"] == "start"] == [0, 12, 24]
    assert whole.summary()["epochs"] > 2
    assert curve(whole) == curve(halves)


def test_a_text_too_short_for_the_steps_stops_a_sweep_in_one_line_and_leaves_nothing_behind(run, c4_layout, tmp_path):
    keep_files(c4_layout, 3)
    for _ in range(2):  # the second time the tokens are there, and it is known at once
        done = run("-m", "trainer.steps=30", "seed=0,1,2", tracking="tracking=wandb")
        assert done.returncode == 2
        assert done.stderr == (
            "error: trainer.steps is 30: that takes 240 rows and there are 180, since the text has no more; allowed: "
            "up to 22 steps, or data.repeat=true\n"
        )
        refused, *others = done.stdout.splitlines()[-3:]
        assert refused.startswith("    refused  job 1: ") and "that takes 240 rows" in refused
        assert all(line.endswith(": not started, since job 1 was refused") for line in others)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["multirun.yaml"]


def test_a_run_that_wants_more_text_than_there_is_says_so_and_keeps_what_it_did(run, c4_layout, tmp_path):
    long = "word and more of it " * 400_000  # seconds, in which the run makes the steps of its first window
    (c4_layout / "en" / "c4-train.00009-of-00010.json.gz").write_bytes(zipped([long]))
    words = ["data.window_tokens=2048", "data.tokenizer.vocabulary_size=300", "optimizer.interval.every=30"]
    done = run("trainer.steps=70", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: trainer.steps is 70: that takes 560 rows and there are 541, since the text ")
    assert "allowed: up to 67 steps, or data.repeat=true" in done.stderr and done.stderr.count("\n") == 1
    found = record(tmp_path)
    assert found.status == "failed"
    assert found.metrics() and list(found.directory.glob("checkpoints/step-*"))
    again = run("trainer.steps=68", *words)
    assert again.returncode == 2 and "that takes 544 rows and there are 541" in again.stderr
    assert record(tmp_path).directory == found.directory, "at once, since the store is whole"


def test_a_broken_file_ends_a_run_and_the_same_command_goes_on_once_it_is_whole(run, c4_layout, tmp_path):
    keep_files(c4_layout, 3)
    file = c4_layout / "en" / "c4-train.00009-of-00010.json.gz"
    digits = random.Random(0)
    content = zipped(f"{digits.getrandbits(32000):x}" for _ in range(60))  # its middle is not in its fingerprint
    broken = bytearray(content)
    broken[len(broken) // 2] ^= 0xFF
    assert len(broken) > 3 * sources.ENDS
    settings = ["trainer.steps=20", "data.window_tokens=2048"]
    file.write_bytes(broken)
    done = run(*settings)
    assert done.returncode == 2
    assert "c4-train.00009-of-00010.json.gz cannot be read after" in done.stderr and "is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "runs").iterdir()) == [], "the tokenizer is trained on it, too"
    file.write_bytes(content)
    done = run(*settings)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path).status == "finished"


def test_a_missing_input_is_one_line_and_exit_code_2(run):
    done = run("data.text_field=content")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: data.text_field is content, which") and "text, timestamp, url" in done.stderr


@pytest.mark.skipif(not LONG, reason="make torture")
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(c4_layout, tmp_path):
    """On a file system of half a megabyte, which needs the right to mount one."""
    disk = tmp_path / "small"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=400k small {disk}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    words = [sys.executable, str(REPOSITORY / "train.py"), "scale=smoke", "tracking=local", *OWN]
    words += [f"run_root={tmp_path / 'runs'}", f"cache_root={disk}", f"data.source={c4_layout}"]
    words += ["trainer.steps=70", "data.window_tokens=16384"]
    script = f'{mount} && head -c 300k /dev/zero > {disk}/filling; "$@"; code=$?; rm {disk}/filling; "$@"; '
    script += "echo $code $?"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *words], capture_output=True, text=True,
                          timeout=240, cwd=tmp_path)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "2 0", done.stderr
    assert "is full: make room (the same command goes on)" in done.stderr
    assert "Traceback" not in done.stderr
