"""The process that prepares: what it leaves, what it says when it fails, and how it ends."""

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.preparation import Preparation
from adafrugal.system.errors import SettingError


@pytest.fixture
def begin():
    """A function that begins a preparation: plan -> Preparation; all are closed at the end."""
    begun = []

    def make(plan):
        begun.append(Preparation(plan, Position(), str))
        return begun[-1]

    yield make
    for preparation in begun:
        preparation.close()


def finish(plan, preparation):
    train, _ = plan.parts()
    preparation.wait(lambda: plan.has_enough(train), str)
    return train


def contents(part):
    return [(part.open(n).tokens.tobytes(), part.open(n).ends.tobytes()) for n in range(len(part.entries))]


def test_an_interrupted_preparation_goes_on_and_leaves_what_an_uninterrupted_one_leaves(plan, begin, tmp_path):
    whole = plan(directory=tmp_path / "whole")
    expected = contents(finish(whole, begin(whole)))
    assert len(expected) > 3
    wanted = plan()
    for count in (1, 2):  # killed twice, after the first and after the second shard
        preparation = begin(wanted)
        train, _ = wanted.parts()

        def there(train=train, count=count):
            train.refresh()
            return len(train.entries) >= count

        preparation.wait(there, str)
        os.kill(preparation._process.pid, signal.SIGKILL)
        preparation._process.wait()
    assert contents(finish(wanted, begin(wanted))) == expected


def test_two_at_once_prepare_one_store(plan, begin, tmp_path):
    whole = plan(directory=tmp_path / "whole")
    expected = contents(finish(whole, begin(whole)))
    wanted = plan()
    first, second = begin(wanted), begin(wanted)
    assert contents(finish(wanted, second)) == expected
    finish(wanted, first)
    assert len((wanted.directory / "train" / "index.jsonl").read_text().splitlines()) == len(expected)


def test_a_broken_file_ends_it_with_its_line_and_what_was_before_stays(plan, begin, c4_layout):
    wanted = plan()
    file = c4_layout / "en" / "c4-train.00007-of-00010.json.gz"
    content = file.read_bytes()
    file.write_bytes(content[:500])
    with pytest.raises(SettingError, match=r"c4-train.00007.* is damaged \(.*\); get the file again"):
        finish(wanted, begin(wanted))
    train, _ = wanted.parts()
    assert len(train.entries) > 0 and not train.is_complete
    file.write_bytes(content)
    documents = sum(entry.documents for entry in finish(wanted, begin(wanted)).entries)
    assert documents == 600


def test_one_that_is_killed_says_so(plan, begin):
    wanted = plan()
    preparation = begin(wanted)
    os.kill(preparation._process.pid, signal.SIGKILL)
    with pytest.raises(SettingError, match=r"ended without its work done \(exit code -9\), .*processes=1 needs less"):
        finish(wanted, preparation)


def test_closing_ends_it_soon_with_its_workers(plan, begin):
    wanted = plan(processes=2, streamed=True)
    preparation = begin(wanted)
    deadline = time.monotonic() + 30
    while len(children := _below(preparation._process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 2
    preparation.close()
    assert preparation._process.returncode != -signal.SIGKILL, "it has ten seconds to end by itself"
    deadline = time.monotonic() + 5
    while any(map(_is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_alive, children))


def test_it_ends_with_the_process_that_began_it(plan, tmp_path):
    wanted = plan()
    (tmp_path / "plan").write_bytes(pickle.dumps(wanted))
    (tmp_path / "script.py").write_text(f"""
import pickle, time
from pathlib import Path
from adafrugal.data.tokens.preparation import Preparation
from adafrugal.data.text.sources import Position
preparation = Preparation(pickle.loads(Path({str(tmp_path / "plan")!r}).read_bytes()), Position(), str)
print(preparation._process.pid, flush=True)
time.sleep(60)
""")
    train, _ = wanted.parts()
    with train.alone() as alone:  # so that it waits, and would for ever
        assert alone
        with subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True) as parent:
            child = int(parent.stdout.readline())
            _, validation = wanted.parts()
            deadline = time.monotonic() + 30
            while not wanted.can_evaluate(validation) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert _is_alive(child)
            parent.kill()
        deadline = time.monotonic() + 10
        while _is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _is_alive(child)


def test_validation_shards_say_what_their_tokens_stand_for(plan, begin):
    wanted = plan()
    _, validation = wanted.parts()
    begin(wanted).wait(lambda: wanted.can_evaluate(validation), str)
    shard = validation.open(0)
    assert shard.token_bytes.dtype == np.uint32
    assert shard.token_bytes.sum() == shard.text_bytes


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - gone at any moment
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _below(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123 - gone at any moment
            children = [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in _below(child)]
