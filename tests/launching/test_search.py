"""The search for rates as a command: real runs, which a second command finds done."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from made import recorded

from adafrugal.launching.search import of_one_source
from adafrugal.reports import arms, records

WORDS = ["optimizer=adamw", "scale=smoke", "tracking=local", "trainer.steps=4", "eval.every=4", "eval.tokens=256"]


@pytest.fixture
def search(cache_root, tmp_path):
    """A function: run the command with more words; return how it ended."""

    def run(*more):
        words = [*WORDS, f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}", *more]
        command = [sys.executable, "-m", "adafrugal.launching.search", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)

    return run


def test_trials_and_then_the_table_s_runs_at_the_best_rates_are_made_once(search, tmp_path):
    done = search("seed=0", "--trials", "2", "--at-once", "2")
    assert done.returncode == 0, done.stderr
    runs = records.find([tmp_path / "runs"])
    made = [(run.config()["seed"], run.config()["optimizer"]["split_lr_scale"]) for run in runs]
    assert sorted(seed for seed, _ in made) == [0, 100, 100]
    losses = {s: run.summary()["validation_loss"] for run, (seed, s) in zip(runs, made, strict=True) if seed == 100}
    assert sorted(losses) == [0.5, 1.0]
    best = min(losses, key=losses.get)
    assert [s for seed, s in made if seed == 0] == [best]
    said = f"adamw: lr 0.001, s {best:g} after 2 trials (at an edge: lr·s, lr): "
    assert said in done.stdout
    again = search("seed=0", "--trials", "2")
    assert again.returncode == 0
    assert again.stdout.splitlines() == [done.stdout.splitlines()[-1]]


def test_a_trial_that_diverges_is_a_result_and_the_search_goes_on(search, tmp_path):
    done = search("optimizer.lr=1e38", "seed=0", "--trials", "2", "--at-once", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the loss is nan") >= 1
    ends = [(run.config()["seed"], run.status) for run in records.find([tmp_path / "runs"])]
    assert len(ends) == 3
    assert ends.count((100, "failed")) >= 1
    assert search("optimizer.lr=1e38", "seed=0", "--trials", "2").stdout == done.stdout.splitlines(keepends=True)[-1]


def test_a_signal_ends_the_runs_in_order_and_the_same_command_goes_on(search, tmp_path, cache_root):
    words = ["trainer.steps=300", "eval.every=300", "trainer.log_every=1", f"run_root={tmp_path / 'runs'}"]
    words.append(f"cache_root={cache_root}")
    command = [sys.executable, "-m", "adafrugal.launching.search", *WORDS, *words, "--trials", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, cwd=REPOSITORY, start_new_session=True)
    until = time.monotonic() + 120
    while not any((run / "metrics.jsonl").exists() for run in (tmp_path / "runs").glob("*/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err.splitlines()[-1] == "interrupted; the same command goes on"
    assert [run.status for run in records.find([tmp_path / "runs"])] == ["interrupted"]
    done = search(*words[:3], "--trials", "1")
    assert done.returncode == 0, done.stderr
    assert [run.status for run in records.find([tmp_path / "runs"])] == ["finished", "finished"]


def test_trials_on_another_text_are_not_taken(tmp_path):
    base = "experiments=c4_60m/adamw scale=mini"
    for name in "ab":
        recorded(tmp_path, f"{base} data.source=mirrors/{name}", seed=100)
    found, jobs = records.find([tmp_path]), arms.jobs([f"{base} data.source=mirrors/b"])
    assert len(found) == 2
    assert [run.config()["data"]["source"] for run in of_one_source(found, jobs)] == ["mirrors/b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0,100"], "error: the search of adamw uses seed 100, which its table uses; take other seeds"),
        (["optimizer.lr=-1"], "error: optimizer.lr is -1.0; allowed: 0 or more"),
        (["--seeds", "a"], "error: --seeds is a; allowed: whole numbers with commas between them"),
        (["--trials", "0"], "error: --trials is 0; allowed: a whole number from 1 on"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_line(search, words, message, tmp_path):
    found = search(*words)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.strip() == message
    assert not (tmp_path / "runs").exists()
