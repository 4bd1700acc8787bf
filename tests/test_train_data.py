"""The real train.py on text from files: resuming, running out of text, missing and broken input, a full disk."""

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from adafrugal.data.text import sources
from adafrugal.tracking.record import Record

OWN = ["data=c4", "data.tokenizer.kind=train", "data.tokenizer.name=null", "eval.tokens=500", "data.processes=1"]
TIMED = ("seconds", "tokens_per_second", "memory", "time")


@pytest.fixture
def command(c4_layout, cache_root, tmp_path):
    """A function that gives the command of a tiny run on `c4_layout`: settings -> words."""

    def make(*arguments, cache=cache_root):
        places = [f"run_root={tmp_path / 'runs'}", f"cache_root={cache}", f"data.source={c4_layout}"]
        train = [sys.executable, str(REPOSITORY / "train.py"), "scale=smoke", "tracking=local"]
        return [*train, *OWN, *places, *arguments]

    return make


@pytest.fixture
def run(command, tmp_path):
    """A function that makes a tiny run on `c4_layout`: settings -> the finished process."""

    def make(*arguments, **more):
        return subprocess.run(
            command(*arguments, **more), capture_output=True, text=True, timeout=240, cwd=tmp_path
        )  # fmt: skip

    return make


def record(tmp_path, arm="adafrugal"):
    (found,) = (tmp_path / "runs").glob(f"*/{arm}-*")
    return Record(found)


def curve(found):
    return [{key: value for key, value in line.items() if key not in TIMED} for line in found.metrics()]


def interrupted(words, found, tmp_path):
    """Begin a run, or go on with it, and ask it to stop once it has made some steps."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    begun = sum(event["event"] == "start" for event in found().events()) if found() else 0
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        events = found().events() if found() else []
        starts = [event["step"] for event in events if event["event"] == "start"]
        if len(starts) > begun and found().metrics() and found().metrics()[-1]["step"] > starts[-1] + 20:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


@pytest.mark.parametrize("store", ["true", "false"])
def test_a_run_interrupted_twice_ends_as_an_uninterrupted_one_bit_for_bit(run, command, store, tmp_path):
    """Over windows and epochs, from a store and from a stream."""
    settings = [f"data.store={store}", "trainer.steps=300", "data.window_tokens=16384", "data.repeat=true"]
    settings += ["eval.every=100", "optimizer.interval.every=100", "checkpoint.every=1000", "trainer.log_every=2"]
    done = run(*settings, "arm=whole")
    assert done.returncode == 0, done.stderr

    def parts():
        return record(tmp_path, "parts") if list((tmp_path / "runs").glob("*/parts-*")) else None

    for _ in range(2):
        interrupted(command(*settings, "arm=parts"), parts, tmp_path)
    done = run(*settings, "arm=parts")
    assert done.returncode == 0, done.stderr
    assert sum(event["event"] == "start" for event in parts().events()) == 3
    assert record(tmp_path, "whole").summary()["epochs"] > 3
    assert curve(record(tmp_path, "whole")) == curve(parts())


def test_a_run_that_wants_more_text_than_there_is_says_so_and_keeps_what_it_did(run, tmp_path):
    done = run("trainer.steps=80", "data.store=false", "data.window_tokens=2048")
    assert done.returncode == 2
    assert done.stderr.startswith("error: trainer.steps is 80: that takes 640 rows and there are 600, since the text ")
    assert "allowed: up to 75 steps, or data.repeat=true" in done.stderr and done.stderr.count("\n") == 1
    found = record(tmp_path)
    assert found.status == "failed"
    assert list(found.directory.glob("checkpoints/step-*"))
    stored = run("trainer.steps=76")
    assert stored.returncode == 2 and "that takes 608 rows and there are 600" in stored.stderr


def test_a_broken_file_ends_a_run_and_the_same_command_goes_on_once_it_is_whole(run, c4_layout, tmp_path):
    file = c4_layout / "en" / "c4-train.00008-of-00010.json.gz"
    digits = random.Random(0)
    with gzip.open(file, "wt") as opened:  # large enough that its middle is not part of its fingerprint
        opened.writelines(json.dumps({"text": f"{digits.getrandbits(32000):x}"}) + "\n" for _ in range(60))
    content = file.read_bytes()
    broken = bytearray(content)
    broken[len(broken) // 2] ^= 0xFF
    assert len(broken) > 3 * sources.ENDS
    settings = ["trainer.steps=70", "data.window_tokens=2048"]
    file.write_bytes(broken)
    done = run(*settings)
    assert done.returncode == 2
    assert "c4-train.00008-of-00010.json.gz cannot be read after" in done.stderr and "is damaged" in done.stderr
    assert record(tmp_path).status == "failed"
    assert "Traceback" not in done.stderr
    file.write_bytes(content)
    done = run(*settings)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path).status == "finished"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("data.source=/nowhere", "data.source is /nowhere, and there is no such file or directory"),
        ("data.split=training", "data.split is training, which"),
        ("data.text_field=content", "data.text_field is content, which"),
        ("data.subset=fr", "data.subset is fr"),
        ("data.tokenizer.vocabulary_size=513", "data.tokenizer.vocabulary_size is 513; allowed: 300 to"),
        ("data.tokenizer.kind=pretrained", "data.tokenizer.name is null; allowed: a hub repository or a directory"),
        ("data.rows=documents", "did you mean document?"),
    ],
)
def test_missing_input_is_one_line_and_exit_code_2(run, wrong, message):
    done = run(wrong)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(run, command, tmp_path):
    """On a file system of half a megabyte, which needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=400k small {place}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    words = command("trainer.steps=70", "data.window_tokens=16384", cache=place)
    script = f'{mount} && head -c 300k /dev/zero > {place}/filling; "$@"; code=$?; find {place} > {tmp_path}/left; '
    script += f'rm {place}/filling; "$@"; echo $code $?'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *words], capture_output=True, text=True,
                          timeout=240, cwd=tmp_path)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "2 0", done.stderr
    assert "is full: make room (the same command goes on)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_is_removed_is_made_again(run, cache_root, tmp_path):
    settings = ["trainer.steps=5", "seed=11"]
    assert run(*settings, "arm=one").returncode == 0
    for place in (cache_root / "tokens").glob("*"):
        if place.name.startswith("c4-train"):
            shutil.rmtree(place)
    assert run(*settings, "arm=two").returncode == 0
    assert curve(record(tmp_path, "one")) == curve(record(tmp_path, "two"))
