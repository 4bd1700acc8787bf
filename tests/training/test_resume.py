"""A run that is stopped between any two steps and continued ends with the bits of one that is not, in every arm."""

import itertools
import re
import signal
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
from torture import LONG, end_of

from adafrugal.optim.choices import SUBSPACES
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")

STOPS = range(12) if LONG else (3, 7)  # a refresh is due at steps 1, 4, 7, …: just before one, and just after
EVERY = [
    f"trainer.steps={12 if LONG else 9}",
    "eval.every=5",
    "eval.tokens=256",
    "trainer.sequence_length=32",
    "trainer.log_every=4",
    "trainer.micro_batch_size=4",
    "checkpoint.every=100",
]
FIXED = ["optimizer=frugal", "optimizer.interval=3", "optimizer.density=0.3"]
MOVING = ["optimizer=adafrugal", "optimizer.interval.every=2", "optimizer.interval.start=3",
          "optimizer.interval.gate=99", "optimizer.interval.threshold=0.9"]  # fmt: skip
ARMS = {
    "adamw": ["optimizer=adamw"],
    "adamw, clipped": ["optimizer=adamw", "trainer.clip_norm=0.1", "schedule=cosine_restarts", "schedule.cycle=6"],
    "adamw in 8 bits": ["optimizer=adamw_8bit"],
    "adafactor": ["optimizer=adafactor"],
    "muon": ["optimizer=muon"],
    "scale": ["optimizer=scale"],
    **{name: [f"optimizer={name}", "optimizer.interval=3"] for name in ("apollo", "fira")},
    "lion": ["optimizer=lion"],
    "signsgd": ["optimizer=signsgd"],
    "badam": ["optimizer=badam", "optimizer.interval=3", "optimizer.density=0.5"],
    "galore": ["optimizer=galore", "optimizer.interval=3"],
    **{s: [*FIXED, f"optimizer.subspace={s}"] for s in (SUBSPACES if LONG else ())},
    **{f"{s}, both move": [*MOVING, f"optimizer.subspace={s}"] for s in SUBSPACES},
    "svd iterated": [*FIXED, "optimizer.subspace={kind:svd,svd_method:subspace_iteration}"],
    "blocks at random": [*FIXED, "optimizer.subspace={kind:blocks,order:random,match:elements}"],
    "refreshes spread": [*FIXED, "optimizer.subspace=columns", "optimizer.stagger=3"],
    "moments kept": [*FIXED, "optimizer.subspace=columns", "optimizer.on_refresh=keep"],
    "moments kept where they overlap": [*FIXED, "optimizer.subspace=columns", "optimizer.on_refresh=keep_overlap"],
    "all moments reset": [*FIXED, "optimizer.subspace=columns", "optimizer.on_refresh=reset_all"],
    "state in bf16": [*FIXED, "optimizer.state_dtype=bfloat16", "optimizer.stochastic_rounding=true"],
    "moments as int8": [*MOVING, "optimizer.subspace=columns", "optimizer.state_dtype=int8"],
    "other rules": [*FIXED, "optimizer.state_full=sgdm", "optimizer.state_free=sgd"],
    "falls at refreshes": [*MOVING, "optimizer.shrink=at_refresh", "optimizer/density=cosine"],
    "training loss": [*MOVING, "optimizer.interval.source=training", "optimizer.interval.smoothing=0.5"],
    "bf16": [*MOVING, "trainer.precision=bf16", "model.loss_chunk_rows=50"],
}


TWELVE = ["trainer.epochs=null", "trainer.steps=12", "optimizer.lr=1e-3"]
SHORT = {  # arms of fine-tuning
    "adamw": TWELVE,
    "adafrugal": [*TWELVE, "optimizer.interval.start=3"],
    **{arm: [*TWELVE, "optimizer.interval=3"] for arm in ("frugal", "galore")},
    **({"lora": TWELVE} if LONG and find_spec("peft") else {}),
}
KILLED = ARMS if LONG else ["columns, both move"]


@pytest.fixture
def ends_alike(tmp_path, monkeypatch):
    """A function that compares a run with one that is stopped at `STOPS`: settings, choices -> None."""

    def check(chosen, choices):
        whole, parts = (replace(chosen, run_root=str(tmp_path / name)) for name in ("whole", "parts"))
        assert run(whole, choices)[1] == "finished"
        left, comes = set(STOPS), Loop._next_batch

        def stopped(loop, stop):
            step = loop.progress.step
            return None if step in left and not left.remove(step) else comes(loop, stop)

        with monkeypatch.context() as patched:
            patched.setattr(Loop, "_next_batch", stopped)
            outcomes = [run(parts, choices)[1] for _ in range(len(STOPS) + 1)]
        assert outcomes == ["interrupted"] * len(STOPS) + ["finished"]
        assert end_of(tmp_path / "parts") == end_of(tmp_path / "whole")

    return check


needs_torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is an extra: pip install torchao")


def marked(arms):
    return [pytest.param(arm, marks=needs_torchao if "8 bits" in arm else ()) for arm in arms]


@pytest.mark.parametrize("arm", marked(ARMS))
def test_pretraining(arm, settings, ends_alike, tally):
    ends_alike(*settings(*EVERY, *ARMS[arm]))
    tally("arms: stopped between any two steps")


@pytest.mark.parametrize("arm", SHORT)
def test_fine_tuning(arm, finetune_settings, ends_alike, tally):
    ends_alike(*finetune_settings("rte", *SHORT[arm], f"optimizer={arm}"))
    tally("arms: stopped between any two steps")


def test_a_step_that_was_left_out(poison, settings, ends_alike):
    """The count of them, and their place, are part of what goes on."""
    poison(2, 8)
    ends_alike(*settings(*EVERY, *MOVING, "trainer.on_nonfinite=skip"))


@pytest.fixture
def survives(forks, cache_root, tmp_path):
    """A function that kills a run (SIGKILL) in its eighth step, two after a checkpoint: words -> None."""

    quick = "from adafrugal.training.run import Run; Run._add_estimate = lambda *_: None"

    def check(*words):
        places = ["scale=smoke", "tracking=local", *words, "checkpoint.every=6", f"cache_root={cache_root}"]
        assert forks(*places, f"run_root={tmp_path / 'whole'}", before=quick).code == 0
        eighth = {"call": "adafrugal.training.loop:Loop.advance", "n": 8}
        assert forks(*places, f"run_root={tmp_path / 'parts'}", kill=eighth).code == -signal.SIGKILL
        again = forks(*places, f"run_root={tmp_path / 'parts'}", before=quick)
        assert again.code == 0, again.err
        assert re.search("continuing after step [456]", again.out), again.out  # the last one may not have been whole
        assert end_of(tmp_path / "parts") == end_of(tmp_path / "whole")

    return check


@pytest.mark.parametrize("arm", marked(KILLED))
def test_pretraining_that_is_killed(arm, survives, tally):
    survives(*EVERY, *ARMS[arm])
    tally("arms: killed")


@pytest.mark.parametrize("arm", SHORT if LONG else ["adafrugal"])
def test_fine_tuning_that_is_killed(arm, survives, finetune_words, tally):
    survives(*finetune_words(), *SHORT[arm], f"optimizer={arm}")
    tally("arms: killed")


def test_events_stand_at_the_steps_of_the_run_and_none_stands_there_twice(poison, settings, finished, monkeypatch):
    """Killed after a step that was left out, since when the optimizer counts fewer; the steps since come again."""
    poison(2, 8)
    skips = ["trainer.on_nonfinite=skip", "checkpoint.every=4"]
    words = [*EVERY, "optimizer=frugal", "optimizer.interval=3", *skips]
    advance = Loop.advance

    def killed(self, work):
        if self.progress.step == 5:
            raise RuntimeError("killed")
        advance(self, work)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Loop, "advance", killed)
        run(*settings(*words))
    assert [event["step"] for event in finished(*words).events() if event["event"] == "refresh"][:3] == [1, 5, 9]


def test_a_clock_that_jumps_changes_nothing_but_times(settings, tmp_path, monkeypatch, tally):
    """Back and forth by years, as it may where a machine's clock is set while a run goes on."""
    chosen, choices = settings(*EVERY, *MOVING)
    assert run(replace(chosen, run_root=str(tmp_path / "whole")), choices)[1] == "finished"
    real, jumps = time.time, itertools.cycle([0, -1e8, 3e8])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(time, "strftime", lambda form, *_: f"{1970 + next(jumps) // 1e8:.0f}-01-01T00:00:00+0000")
    record, outcome = run(replace(chosen, run_root=str(tmp_path / "jumps")), choices)
    assert outcome == "finished"
    assert end_of(tmp_path / "jumps") == end_of(tmp_path / "whole")
    assert all(0 <= seconds < 600 for line in record.metrics() for seconds in line["seconds"].values())
    tally("faults: a clock that jumps")
