"""Runs that go on from another run's checkpoint: to the bit what they would have been, recorded, or refused."""

import hashlib
import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import REPOSITORY
from torch.utils._pytree import keystr, tree_flatten_with_path

from adafrugal.reports import pictures, summary
from adafrugal.settings.compose import check
from adafrugal.settings.identity import identify
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.training import lineage
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")

FIXED = ["schedule.warmup=2", "eval.tokens=256", "trainer.sequence_length=32", "eval.every=5", "trainer.log_every=4"]
MOVING = [*FIXED, "optimizer.density.steps=16", "optimizer.interval.every=2", "optimizer.interval.start=3",
          "optimizer.interval.gate=99", "optimizer.interval.threshold=0.9", "optimizer.interval.max=20"]  # fmt: skip
CONSTANT, WSD = "schedule=constant", ["schedule=wsd", "schedule.cooldown=8", "schedule.floor=0.1"]
ARMS = {
    "adafrugal": MOVING,
    "adafrugal, training loss": [*MOVING, "optimizer.interval.source=training"],
    "adafrugal, columns at random": [*MOVING, "optimizer.subspace=randk", "trainer.precision=bf16"],
    "adamw": [*FIXED, "optimizer=adamw"],
    "muon": [*FIXED, "optimizer=muon"],
}


@pytest.fixture(scope="module")
def made(composed, cache_root, tmp_path_factory, imported):
    """A function that makes a run below one root, once: words -> its record."""
    root = tmp_path_factory.mktemp("runs")
    places = ["scale=smoke", "tracking=local", f"run_root={root}", f"cache_root={cache_root}"]
    known = {}

    def make(*words):
        if words not in known:
            found, choices = composed(*places, *words)
            known[words], _ = run(check(found, choices), choices)
        return known[words]

    return make


@pytest.fixture
def identity_of(composed):
    """A function: the words of a command -> the identity of its run."""

    def make(*words):
        found, choices = composed(*words)
        return identify(check(found, choices), choices)

    return make


@pytest.fixture
def source(made):
    """The record of the run that others continue."""
    return made(CONSTANT, "trainer.steps=8", *MOVING)


@pytest.fixture
def another(settings, source):
    """A function that checks a run which goes on from `source`, as its session does: words -> its settings."""

    def make(*words):
        found, _ = settings(*MOVING, f"trainer.continue_from={source.directory}", *words)
        lineage.refuse_another_past(found)
        return found

    return make


def end(record):
    """The tensors and numbers of the last checkpoint, without measurements."""
    newest = max((record.directory / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.pt", weights_only=True)
    kept = [state[name] for name in ("optimizer", "scheduler", "random", "task")]
    return newest.name, (newest / "model.safetensors").read_bytes(), kept


def rewrite(source, target, change):
    """Write a checkpoint's state with a change to it, as if it had been saved so."""
    state = torch.load(source / "state.pt", weights_only=True)
    change(state)
    torch.save(state, target / "state.pt")
    digests = json.loads((source / "checksums.json").read_text())
    digests["state.pt"] = hashlib.sha256((target / "state.pt").read_bytes()).hexdigest()
    (target / "checksums.json").write_text(json.dumps(digests))


def assert_same(one, other):
    assert one[:2] == other[:2]
    (mine, tree), (theirs, same) = (tree_flatten_with_path(state[2]) for state in (one, other))
    assert tree == same
    for (path, a), (_, b) in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, keystr(path)


@pytest.mark.parametrize("arm", ARMS)
def test_a_cooldown_branched_from_a_constant_run_is_that_of_a_run_configured_so_from_the_start(arm, made):
    source = made(CONSTANT, "trainer.steps=8", *ARMS[arm])
    branch = made(*WSD, "trainer.steps=16", *ARMS[arm], f"trainer.continue_from={source.directory}")
    whole = made(*WSD, "trainer.steps=16", *ARMS[arm])
    assert_same(end(branch), end(whole))
    assert branch.metrics()[0]["step"] == 10
    last, same = branch.metrics()[-1], whole.metrics()[-1]
    for name in ("lr", "density", "interval", "tokens", "validation_loss", "state_bytes"):
        assert last[name] == same[name]
    assert {name: branch.summary()[name] for name in ("steps", "tokens", "refreshes", "unigram")} == {
        name: whole.summary()[name] for name in ("steps", "tokens", "refreshes", "unigram")
    }
    if arm == "adafrugal":
        assert last["interval"] > 3, "T moved, and what it had observed came with the checkpoint"


def test_a_constant_run_that_goes_on_is_the_longer_one_also_over_an_interruption_without_its_source(
    made, source, settings, tmp_path, monkeypatch
):
    whole = made(CONSTANT, "trainer.steps=16", *MOVING)
    theirs = tmp_path / "theirs" / source.directory.name
    shutil.copytree(source.directory, theirs)
    words = (CONSTANT, "trainer.steps=16", *MOVING, f"trainer.continue_from={theirs}")
    comes, calls = Loop._next_batch, []

    def stopped(loop, stop):
        calls.append(loop.progress.step)
        return None if len(calls) == 4 else comes(loop, stop)

    monkeypatch.setattr(Loop, "_next_batch", stopped)
    record, outcome = run(*settings(*words))
    assert (outcome, calls) == ("interrupted", [8, 9, 10, 11])
    shutil.rmtree(theirs)
    assert run(*settings(*words))[1] == "finished"
    assert_same(end(record), end(whole))
    assert run(*settings(*words))[1] == "finished before"
    begins = {"run": source.directory.name, "step": 8, "code": source.environment()["code"]}
    assert record.environment()["continued_from"] == record.summary()["continued_from"] == begins


def test_the_name_of_the_checkpoint_is_part_of_what_a_run_is_and_its_place_is_not(settings, source, tmp_path):
    moved = tmp_path / "moved" / source.directory.name
    shutil.copytree(source.directory, moved)
    words = [CONSTANT, "trainer.steps=16", *MOVING]
    places = (source.directory, moved, moved / "checkpoints", moved / "checkpoints" / "step-00000008")
    keys = [identify(*settings(*words, f"trainer.continue_from={place}")).key for place in places]
    assert len(set(keys)) == 1
    shutil.rmtree(moved)
    assert identify(*settings(*words, f"trainer.continue_from={places[-1]}")).key == keys[0]
    assert identify(*settings(*words)).key != keys[0]


def test_the_record_and_what_is_shown_say_where_a_run_began(made, source, tmp_path):
    record = made(*WSD, "trainer.steps=16", *MOVING, f"trainer.continue_from={source.directory}")
    name = f"{source.directory.name}/step-8"
    assert record.config()["trainer"]["continue_from"] == name
    assert record.environment()["identity"]["differs"]["trainer.continue_from"] == name
    assert re.search(rf"continued from +{source.directory.name} after step 8\n", summary.text(record))
    pictures.draw_run(record, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size


REFUSED = {
    "schedule=cosine trainer.steps=16": ["schedule is cosine over 16", "had 1;", "constant, and wsd up to"],
    "schedule=wsd trainer.steps=16 schedule.cooldown=10": ["at step 8", "schedule.cooldown=8 or less"],
    "schedule=constant trainer.steps=16 schedule.warmup=3": ["factor 0.3333 at step 2", "schedule.warmup=2"],
    "schedule=constant trainer.steps=8": ["trainer.steps is 8", "above 8"],
    "schedule=constant trainer.steps=16 seed=1": ["seed is 1, and the continued run had 0"],
    "schedule=constant trainer.steps=16 trainer.batch_size=4": ["trainer.batch_size is 4", "allowed: 8"],
    "schedule=constant trainer.steps=16 model.rms_norm_eps=1e-5": ["model.rms_norm_eps is 1e-05", "had 1e-06"],
    "schedule=constant trainer.steps=32 optimizer.density.steps=null":
        ["optimizer.density.steps is 32", "optimizer.density.steps=16, since it follows the length"],
    "schedule=constant trainer.steps=80 optimizer.interval.every=null":
        ["optimizer.interval.every is 4", "optimizer.interval.every=2, since it follows the length"],
    "schedule=constant trainer.steps=16 optimizer.density=0.25": ["optimizer.density is", "'constant'", "'linear'"],
    "schedule=constant trainer.steps=16 optimizer.interval.factor=2": ["optimizer.interval.factor is 2.0", "had 1.5"],
    "schedule=constant trainer.steps=16 eval.tokens=512": ["eval.tokens is 512", "eval.tokens=256"],
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_another_past_is_refused_in_a_line(words, another):
    with pytest.raises(SettingError) as caught:
        another(*words.split())
    assert "\n" not in str(caught.value)
    for part in REFUSED[words]:
        assert part in str(caught.value)


def test_what_decides_only_the_future_may_differ(another):
    later = ["eval.every=3", "checkpoint.every=5", "trainer.log_every=1", "eval.last_tokens=512", "tracking=local"]
    another(CONSTANT, "trainer.steps=16", *later, "trainer.micro_batch_size=2")


def test_a_density_of_the_same_numbers_under_another_name_goes_on_as_this_runs(made):
    words = [CONSTANT, *FIXED, "optimizer=frugal", "optimizer.interval=3"]
    source = made(*words, "trainer.steps=4", "optimizer.density=0.25")
    level = ["optimizer/density=linear", "optimizer.density.end=0.25", "optimizer.density.steps=4"]
    branch = made(*words, "trainer.steps=8", *level, f"trainer.continue_from={source.directory}")
    whole = made(*words, "trainer.steps=8", *level)
    assert_same(end(branch), end(whole))


def test_the_loss_of_a_last_evaluation_on_more_text_is_in_no_other_runs_past(made, settings):
    source = made(CONSTANT, "trainer.steps=4", *MOVING, "eval.last_tokens=512")
    found, _ = settings(CONSTANT, "trainer.steps=8", *MOVING, f"trainer.continue_from={source.directory}")
    with pytest.raises(SettingError, match=r"eval.last_tokens .512. at its last step, 4.* an earlier checkpoint"):
        lineage.refuse_another_past(found)


def test_a_checkpoint_that_is_not_there_damaged_or_of_another_run_is_refused_in_a_line(settings, source, tmp_path):
    def begin(place):
        return run(*settings(CONSTANT, "trainer.steps=16", *MOVING, f"trainer.continue_from={place}"))

    copied = tmp_path / source.directory.name
    shutil.copytree(source.directory, copied)
    with pytest.raises(SettingError, match="has no checkpoint; allowed: a run's directory, such as runs/"):
        begin(tmp_path)
    with pytest.raises(SettingError, match=r"step-00000007, which does not exist.*step-00000008"):
        begin(copied / "checkpoints" / "step-00000007")
    shutil.copytree(copied, tmp_path / "renamed")
    with pytest.raises(SettingError, match=f"environment.json is of the run {copied.name}"):
        begin(tmp_path / "renamed")
    for change in (lambda state: state.pop("settings"), lambda state: state["account"].update(unknown=1),
                   lambda state: state["optimizer"]["param_groups"].pop()):  # fmt: skip
        rewrite(source.directory / "checkpoints" / "step-00000008", copied / "checkpoints" / "step-00000008", change)
        with pytest.raises(TrainingError, match="the checkpoint was written by another version of this code"):
            begin(copied)
    (copied / "checkpoints" / "step-00000008").rename(copied / "checkpoints" / "step-00000006")
    with pytest.raises(SettingError, match="another run or step"):
        begin(copied)
    (copied / "checkpoints" / "step-00000006" / "state.pt").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"damaged \(state.pt is not as it was written\)"):
        begin(copied)


def test_a_longer_run_says_that_it_begins_anew_and_what_to_do(settings, capsys):
    words = [*MOVING, "trainer.steps=4"]
    for schedule in ("constant", "cosine"):
        run(*settings(f"schedule={schedule}", *words))
    run(*settings("schedule=cosine", *words, "seed=1"))
    assert "begins anew" not in capsys.readouterr().out
    constant, cosine = (identify(*settings(f"schedule={name}", *words)).directory for name in ("constant", "cosine"))
    run(*settings("schedule=constant", *words, "trainer.steps=5"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "begins anew" in line]
    assert line == (
        f"{constant.name} is this run with trainer.steps=4, and finished; this one begins anew; to go on from it: "
        f"trainer.continue_from={constant}"
    )
    run(*settings("schedule=cosine", *words, "trainer.steps=5"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "begins anew" in line]
    assert line.startswith(f"{cosine.name} is this run with trainer.steps=4") and "it cannot go on: schedule is" in line


def test_a_pattern_means_the_run_that_has_the_past_of_this_one(made, settings, source, tmp_path):
    grid = [f"optimizer.lr={lr} seed={seed}".split() for lr in ("1e-3", "2e-3") for seed in (0, 1)]
    words = [CONSTANT, "trainer.steps=8", *MOVING]
    runs = [source, *(made(*words, *more) for more in grid[1:])]  # the first has the default's rate and seed
    pattern = f"{source.directory.parent}/adafrugal-*"
    for more, run_ in zip(grid, runs, strict=True):
        found, _ = settings(*WSD, "trainer.steps=16", *MOVING, *more, f"trainer.continue_from={pattern}")
        assert found.trainer.continue_from == str(run_.directory / "checkpoints" / "step-00000008")


def test_a_pattern_that_means_no_run_or_several_is_refused_with_their_names(settings, source, tmp_path):
    root = tmp_path / "few"
    shutil.copytree(source.directory, root / source.directory.name)

    def begin(*words, tail=""):
        return settings(CONSTANT, *MOVING, *words, f"trainer.continue_from={root}/adafrugal-*{tail}")

    with pytest.raises(SettingError, match=rf"none of its 1 .*such as {source.directory.name}: seed is 1, and the"):
        begin("trainer.steps=16", "seed=1")
    with pytest.raises(SettingError, match=r"none of its 0 runs with checkpoints has the past of this run; allowed"):
        begin("trainer.steps=16", tail="x")
    with pytest.raises(SettingError, match=r"trainer.steps is 8"):
        begin("trainer.steps=8")
    longer, _ = run(*settings(CONSTANT, *MOVING, "trainer.steps=12", f"trainer.continue_from={source.directory}"))
    shutil.copytree(longer.directory, root / longer.directory.name)
    several = sorted(str(root / record.directory.name) for record in (source, longer))
    with pytest.raises(SettingError, match=rf"from which this run may go on are several: {', '.join(several)}; name"):
        begin("trainer.steps=16")
    found, _ = begin("trainer.steps=16", tail="/checkpoints/step-00000012")
    assert found.trainer.continue_from == str(root / longer.directory.name / "checkpoints" / "step-00000012")


def test_the_same_command_with_a_pattern_goes_on_from_where_it_began(settings, source, tmp_path, monkeypatch):
    """Although the run itself, and longer ones, have come to match the pattern, and the source is gone."""
    theirs = tmp_path / "runs" / "pretrain-embedded-llama_tiny" / source.directory.name
    shutil.copytree(source.directory, theirs)
    words = [CONSTANT, "trainer.steps=16", *MOVING, f"trainer.continue_from={theirs.parent}/*"]
    comes = Loop._next_batch
    monkeypatch.setattr(Loop, "_next_batch", lambda loop, stop: (loop.progress.step < 10 and comes(loop, stop)) or None)
    record, outcome = run(*settings(*words))
    assert outcome == "interrupted" and record.directory.parent == theirs.parent
    monkeypatch.undo()
    run(*settings(CONSTANT, "trainer.steps=12", *MOVING, f"trainer.continue_from={theirs}"))
    shutil.rmtree(theirs)
    again, outcome = run(*settings(*words))
    assert (again.directory, outcome) == (record.directory, "finished")


def test_the_commands_of_the_page_run(made, identity_of):
    """With a fiftieth of the steps, and the tiny model."""
    page = (REPOSITORY / "docs" / "runs.md").read_text()
    section = page.partition("## Longer, branched and continued runs\n")[2].partition("\n##")[0].replace("\\\n", "")
    lines = [shlex.split(line)[2:] for line in re.findall(r"^python train.py .*", section, re.MULTILINE)]
    typed, (grid, cooldowns) = lines[:3], lines[3:]
    key = identity_of(*typed[0]).key
    records = []
    for words in typed:
        few = [re.sub(r"(?<==)\d+$", lambda number: str(int(number[0]) // 50), word) for word in words]
        if few[-1].startswith("trainer.continue_from="):
            assert words[-1].endswith(f"runs/pretrain-embedded-llama_3m/{key}/checkpoints/step-00001000")
            few[-1] = f"trainer.continue_from={records[0].directory}/checkpoints/step-00000020"
        records.append(made(*few))
    assert [record.summary()["steps"] for record in records] == [20, 40, 25]
    for words in (grid, cooldowns):
        assert words[:3] == ["-m", "seed=0,1", "optimizer.lr=1e-3,3e-3"]
        few = [re.sub(r"(?<==)\d+$", lambda number: str(int(number[0]) // 50), word) for word in words[3:]]
        few = [word.replace("runs/pretrain-embedded-llama_3m", str(records[0].directory.parent)) for word in few]
        records.append(
            made("optimizer.lr=3e-3", "seed=1", "arm=grid", *(w.replace("adafrugal-*", "grid-*") for w in few))
        )
    assert records[-1].summary()["continued_from"]["run"] == records[-2].directory.name
