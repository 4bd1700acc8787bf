"""The same settings on one process, on two with copies of the model (DDP), and on two with shards of it (FSDP2)."""

import functools
import json
import shutil
import sys
from pathlib import Path

import on_ranks
import pytest
import safetensors.torch
import torch
from torture import LONG

from adafrugal.system.errors import DONE, WRONG
from adafrugal.tracking.record import Record
from adafrugal.training import __main__ as command_of_training
from adafrugal.training import evaluate
from adafrugal.training.checkpoints import checkpoint

STEPS = 30 if LONG else 14
LEFT_AT = STEPS // 2
# rows that two processes cannot halve; T moves, ρ falls, several refreshes
SAME = [
    "scale=smoke", "tracking=local", f"trainer.steps={STEPS}", "trainer.log_every=1", "checkpoint.every=100",
    "trainer.timeout=60", "eval.every=7", "eval.tokens=500", "trainer.sequence_length=32",
    "model.vocabulary_size=511", "model.intermediate_size=85",
]  # fmt: skip
MOVING = ["optimizer=adafrugal", "optimizer.interval.every=2", "optimizer.interval.start=3", "optimizer.interval.max=4",
          "optimizer.interval.gate=99", "optimizer.interval.threshold=0.9", "optimizer.density.start=0.6"]  # fmt: skip
RIGHT = "{{kind:{},side:right}}".format
ARMS = {
    "adamw": ["optimizer=adamw", "trainer.clip_norm=0.5"],
    "blocks": MOVING,
    "columns": [*MOVING, "optimizer.subspace=columns", "trainer.micro_batch_size=2", "model.loss_chunk_rows=50"],
    "slab": [*MOVING, "optimizer.subspace=slab", "trainer.activation_checkpointing=layers"],
}
WAYS = {  # of FSDP, which change nothing else
    "updates in the backward pass": ["trainer.update_in_backward=true"],
    "weights on the CPU": ["trainer.offload=true"],
    "two copies": ["trainer.replicas=2"],
}
if LONG:
    few = ["optimizer.density.start=0.13", "optimizer.on_refresh=keep"]  # the last of many directions are rounding's
    ARMS |= {"svd": [*MOVING, f"optimizer.subspace={RIGHT('svd')}", *few],
             "random": [*MOVING, f"optimizer.subspace={RIGHT('random')}"]}  # fmt: skip
    WAYS["compiled"] = ["trainer.compile=true"]
LEFT = ("adamw", "columns", "slab") if LONG else ("adamw", "slab")
NUMBERS = {1: "none", 2: "ddp", 4: "fsdp"} if LONG else {1: "none"}


def on(forks, processes, jobs, cache_root, timeout=300):
    """Run jobs on so many processes; what was seen of each."""
    words = [{**job, "words": [*SAME, f"cache_root={cache_root}", *job["words"]]} for job in jobs]
    if processes == 1:
        return [on_ranks.made(job) for job in words]
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import on_ranks; sys.exit(on_ranks.main())"
    begun = forks.ranks(processes, json.dumps(words), before=here)
    ended = [process.wait(timeout) for process in begun]
    assert [done.code for done in ended] == [0] * processes, ended[0].err
    return json.loads(ended[0].out.splitlines()[-1])


def job(root, name, way, arm, *words, **more):
    return {name: {"words": [*ARMS[arm], f"trainer.parallel={way}", f"run_root={root / way / name}", *words], **more}}


def jobs_of(root, way):
    """All runs of one way, and what is to be seen of each."""
    jobs = {}
    for arm in ARMS:
        more = {"listen to the optimizer": 2} if way == "fsdp" else {}  # a step without a refresh
        if (way, arm) == ("ddp", "columns"):
            more = {"listen": [3, 6]}  # the second step is when DDP arranges its buckets
        jobs |= job(root, arm, way, arm, **more)
    if way != "none":
        jobs |= job(root, "left out", way, "blocks", "trainer.on_nonfinite=skip", poison=[1, 5])
    if way == "fsdp":
        for name, words in WAYS.items():
            jobs |= job(root, name, way, "blocks", *words)
        for arm in LEFT:
            jobs |= job(root, f"{arm} left", way, arm, stop=LEFT_AT)
    return jobs


@pytest.fixture(scope="module")
def runs(forks, once, cache_root):
    """A function that gives all runs of one way (none, ddp, fsdp), made once: its name -> what was seen of each."""

    def make(way):
        def maker(root):
            jobs = jobs_of(root, way)
            seen = on(forks, 1 if way == "none" else 2, [*jobs.values()], cache_root)
            return dict(zip(jobs, seen, strict=True))

        return once(way, maker)

    return functools.cache(make)


def losses(run):
    """Training losses by step and validation losses."""
    lines = Record(Path(run["directory"])).metrics()
    return [line["loss"] for line in lines], [line["validation_loss"] for line in lines if "validation_loss" in line]


def events(run, *kinds):
    return [
        {key: event[key] for key in ("event", "step", "density", "interval", "before", "after") if key in event}
        for event in Record(Path(run["directory"])).events()
        if event["event"] in kinds
    ]


def norms(run):
    """The gradient's norm of each line."""
    return [line["gradient_norm"] for line in Record(Path(run["directory"])).metrics()]


def assert_alike(run, other):
    assert run["outcome"] == other["outcome"] == "finished"
    for ours, theirs in zip(losses(run), losses(other), strict=True):
        assert len(ours) == len(theirs)
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert Path(run["directory"]).name == Path(other["directory"]).name, "one run has one identity"


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_losses_are_those_of_one_process(runs, arm, way):
    run, alone = runs(way)[arm], runs("none")[arm]
    assert_alike(run, alone)
    assert len(losses(run)[0]) == STEPS
    kinds = "refresh", "shrink", "interval"
    assert events(run, *kinds) == events(alone, *kinds)
    assert arm == "adamw" or len(events(run, "refresh")) > 3
    assert norms(run) == pytest.approx(norms(alone), rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_sharding_changes_no_loss(runs, way):
    run, alone = runs("fsdp")[way], runs("none")["blocks"]
    assert_alike(run, alone)
    if way != "updates in the backward pass":  # which has freed the gradients
        assert norms(run) == pytest.approx(norms(alone), rel=1e-3)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_record_counts_what_one_process_would(runs, arm, way):
    """Tokens of all processes, and state over all of them, whose parts are each process's own."""
    ours, theirs = (Record(Path(runs(each)[arm]["directory"])).summary() for each in (way, "none"))
    for name in ("tokens", "real_tokens", "parameters", "state_bytes", "refreshes", "interval", "density"):
        assert ours[name] == theirs[name], name
    parts = ours["processes"]["state_bytes"]
    if way == "ddp":
        assert parts == [theirs["state_bytes"]["end"]] * 2
    elif arm in ("adamw", "blocks", "columns"):
        assert parts == pytest.approx([theirs["state_bytes"]["end"] / 2] * 2, rel=0.05)


def test_copies_sum_their_gradients_once_a_step(runs):
    """Two micro-batches on each process: one all-reduce for the only bucket, and no other word."""
    for step in (3, 6):
        assert runs("ddp")["columns"][f"step {step}"] == {"c10d::allreduce_": 1}


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "adamw"])
def test_the_optimizers_step_says_nothing_between_refreshes(runs, arm):
    assert runs("fsdp")[arm]["optimizer"] == {}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_all_leave_out_a_step_whose_loss_is_no_number_on_one(runs, way):
    run = runs(way)["left out"]
    assert run["outcome"] == "finished"
    record = Record(Path(run["directory"]))
    assert record.summary()["skips"] == 1
    assert [event["step"] for event in record.events() if event["event"] == "nonfinite"] == [5]


@pytest.fixture(scope="module")
def continued(forks, runs, once, cache_root):
    """Runs that two processes left half done, continued by other numbers of them."""
    left = runs("fsdp")

    def make(root):
        found = {}
        for processes, way in NUMBERS.items():
            jobs = {}
            for arm in LEFT:
                assert left[f"{arm} left"]["outcome"] == "interrupted"
                shutil.copytree(root / "fsdp" / f"{arm} left", root / way / f"{arm} on {processes}")
                jobs |= job(root, f"{arm} on {processes}", way, arm)
            found |= zip(jobs, on(forks, processes, [*jobs.values()], cache_root), strict=True)
        return found

    return once("continued", make)


@pytest.mark.parametrize("arm", LEFT)
@pytest.mark.parametrize("processes", NUMBERS)
def test_two_processes_run_is_continued_by_another_number(continued, runs, processes, arm):
    run = continued[f"{arm} on {processes}"]
    assert_alike(run, runs("none")[arm])
    assert [event["step"] for event in events(run, "start")] == [0, LEFT_AT]


def convert(monkeypatch, source, target):
    monkeypatch.setattr(sys, "argv", ["adafrugal.training", str(source), str(target)])
    return command_of_training.main()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The last checkpoint of a run in shards, made whole by the command."""
    (source,) = Path(runs("fsdp")["slab"]["directory"]).glob("checkpoints/step-*")
    target = tmp_path_factory.mktemp("converted") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert convert(patch, source, target) == DONE
    return source, target


def test_a_checkpoint_in_shards_becomes_one_that_transformers_reads(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = whole
    assert checkpoint.damage(target) is None
    assert (source / "README.md").read_bytes() == (target / "README.md").read_bytes()
    ours, theirs = (AutoTokenizer.from_pretrained(place).encode("a </s> gradient") for place in (source, target))
    assert ours == theirs and len(ours) > 4
    found = AutoModelForCausalLM.from_pretrained(target).state_dict()
    files = [safetensors.torch.load_file(file) for file in sorted(source.glob("shard-*.safetensors"))]
    assert len(files) == 2
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.cat([file[name] for file in files if name in file])), name


def test_one_process_evaluates_a_checkpoint_in_shards(whole, cache_root):
    source, _ = whole
    line = Record(source.parents[1]).metrics()[-1]
    found = evaluate.evaluate(source, [f"cache_root={cache_root}"])
    assert found["validation_loss"] == pytest.approx(line["validation_loss"], rel=1e-6)


def test_and_its_state_is_that_of_one_process(whole, runs):
    _, target = whole
    (reference,) = Path(runs("none")["slab"]["directory"]).glob("checkpoints/step-*")
    ours, theirs = (torch.load(place / "state.pt", weights_only=True)["optimizer"] for place in (target, reference))
    for own, reference in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {**own, "interval": None} == {**reference, "interval": None}, "it holds losses"
    assert ours["state"].keys() == theirs["state"].keys()
    for number, kept in theirs["state"].items():
        assert kept.keys() == ours["state"][number].keys()
        for name, value in kept.items():
            found = ours["state"][number][name]
            if isinstance(value, torch.Tensor):
                assert found.shape == value.shape
                assert (found - value).norm() <= 1e-3 * value.norm(), (number, name)
            else:
                assert found == value


def test_what_cannot_be_converted_is_refused_in_a_line(whole, tmp_path, monkeypatch, capsys):
    source, target = whole
    for place, there, said in (
        (source, target, f"{target} exists; name a new directory"),
        (target, tmp_path / "new", f"{target} has whole tensors already"),
        (tmp_path, tmp_path / "new", f"{tmp_path} is no checkpoint; allowed: a directory step-… of a run's"),
    ):
        assert convert(monkeypatch, place, there) == WRONG
        assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_so_it_is_on_two_gpus(way, forks, tmp_path, cache_root):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    fp32 = "trainer.precision=fp32"
    (alone,) = on(forks, 1, [*job(tmp_path, "one GPU", "none", "columns", fp32).values()], cache_root)
    listening = job(tmp_path, "GPUs", way, "columns", fp32, **{"listen to the optimizer": 2})
    (both,) = on(forks, 2, [*listening.values()], cache_root)
    assert alone["outcome"] == both["outcome"] == "finished"
    assert both["optimizer"] == {}
    for ours, theirs in zip(losses(both), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)  # sums on a GPU have no order
