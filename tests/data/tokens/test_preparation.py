"""The process that prepares: what it leaves, what it says when it fails, and how it ends."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import prepare

from adafrugal.data.tokens.preparation import Preparation
from adafrugal.system.errors import SettingError


@pytest.fixture
def begin(request):
    """A function that begins a preparation: plan -> Preparation; all are closed at the end."""

    def make(plan):
        request.addfinalizer((found := Preparation(plan, str)).close)
        return found

    return make


def contents(plan):
    return [[(shard.tokens.tobytes(), shard.ends.tobytes()) for shard in split.shards()] for split in plan.splits()]


def test_an_interrupted_preparation_goes_on_and_leaves_the_store_of_an_uninterrupted_one(plan, begin, tmp_path):
    expected = contents(prepare(plan(directory=tmp_path / "whole")))
    wanted = plan()
    preparation = begin(wanted)
    preparation.wait(lambda: preparation.train.refresh() or len(preparation.train.entries) >= 2)
    os.kill(preparation._helper.process.pid, signal.SIGKILL)
    preparation._helper.process.wait()
    with pytest.raises(SettingError, match=r"ended without its work done \(exit code -9\), .*processes=1 needs less"):
        preparation.wait(lambda: False)
    first, second = begin(wanted), begin(wanted)  # at once: they prepare one store
    second.finish()
    first.finish()
    assert contents(wanted) == expected and len(expected[0]) > 3
    assert len((wanted.directory / "train" / "index.jsonl").read_text().splitlines()) == len(expected[0])


def test_it_ends_with_its_workers_when_the_process_that_began_it_does(plan, tmp_path):
    wanted = plan(processes=2)
    (tmp_path / "plan").write_bytes(pickle.dumps(wanted))
    script = (
        "import pickle, sys, time\n"
        "from adafrugal.data.tokens.preparation import Preparation\n"
        f"preparation = Preparation(pickle.load(open({str(tmp_path / 'plan')!r}, 'rb')), str)\n"
        "print(preparation._helper.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    train, validation = wanted.splits()
    with train.alone() as alone:  # so that it waits, and would for ever
        assert alone
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
            child = int(parent.stdout.readline())
            deadline = time.monotonic() + 60
            while not wanted.can_evaluate(validation):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            children = [child, *_below(child)]
            assert len(children) >= 3
            parent.kill()
        deadline = time.monotonic() + 10
        while any(map(_is_alive, children)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_closing_ends_it_soon(plan, begin):
    wanted = plan()
    train, _ = wanted.splits()
    with train.alone():
        preparation = begin(wanted)
        preparation.wait(lambda: wanted.can_evaluate(preparation.validation))
        preparation.close()
    assert preparation._helper.process.returncode == 0, "it has ten seconds to end by itself"
    assert preparation.validation.open(0).token_bytes.sum() == preparation.validation.open(0).text_bytes


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _below(pid):
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in _below(child)]
