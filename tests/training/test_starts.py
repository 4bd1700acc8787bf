"""Every experiment starts on a GPU: on a stand-in for torch.cuda, which raises where a call comes too early."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import stand_in
import torch

from adafrugal.memory import estimate
from adafrugal.memory.trace import Footprint
from adafrugal.training import devices
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")

ROOT = Path(__file__).resolve().parents[2] / "experiments"
PARTS = ("results", "tables", "published", "pretraining", "benchmarks")
FILES = [file.relative_to(ROOT) for file in ROOT.rglob("*.yaml") if not file.stem.startswith("_")]
EXPERIMENTS = sorted(file.with_suffix("").as_posix() for file in FILES if file.parts[0] not in PARTS)
PEAK = Footprint(weights=2**20, gradients=2**20, state=2**20, activations=2**30, temporaries=2**30, phase="backward")


@pytest.fixture
def gpu(monkeypatch):
    with stand_in.installed(monkeypatch) as found:
        yield found


@pytest.fixture
def foretold(monkeypatch):
    """A function that stands for the estimate: a row of a micro-batch -> bytes."""

    def make(bytes_of_a_row):
        def fake(settings):
            more = settings.trainer.micro_batch_size * bytes_of_a_row
            peak = replace(PEAK, activations=PEAK.activations + more)
            return estimate.Estimate(1, 1, (estimate.Stage(None, {}, peak, PEAK),))

        monkeypatch.setattr(estimate, "estimate", fake)

    make(0)  # the real one takes a minute for all experiments, and has no CUDA in it
    return make


@pytest.fixture
def tiny(settings, finetune_settings, foretold):
    """A function that gives an experiment's settings with a tiny model and tiny data: name, overrides -> …"""

    def make(name, *overrides):
        few = ["trainer.batch_size=2", "trainer.micro_batch_size=null", "eval.tokens=64", *overrides]
        if name.startswith("glue/"):
            return finetune_settings(name.removeprefix("glue/").partition("_")[0], *few)
        text = ["data=embedded", "trainer.steps=2", "eval.every=2", "model=llama_tiny", "model.num_hidden_layers=4"]
        text += [] if name.startswith("embedded/") else ["schedule.cycle=null", "schedule.warmup=null"]
        return settings(f"experiments={name}", *text, *few)

    return make


@pytest.fixture
def started(gpu, monkeypatch):
    """A function that starts a run in some precision, saves a checkpoint and leaves it -> its record and its start."""

    def save_at_once(loop, stop):
        if not (loop.record.directory / "checkpoints").exists():
            loop._saved_step = None  # step 0 has nothing to save by itself
        loop._save()
        loop._note(loop._writer.wait())
        return False

    def make(chosen, choices, precision="bf16"):
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "fit", save_at_once)
            gpu.forget()
            record, outcome = run(in_precision(chosen, precision), choices)
        assert outcome == "interrupted"
        assert gpu.opens_first(), gpu.calls
        return record, [event for event in record.events() if event["event"] == "start"][-1]

    return make


def in_precision(chosen, precision):
    return replace(chosen, trainer=replace(chosen.trainer, precision=precision))


def test_there_are_experiments_of_every_kind():
    assert {"c4_60m/adamw", "c4_1b/adafrugal", "glue/rte", "subspaces/svd", "vietvault_130m/frugal"} <= {*EXPERIMENTS}


@pytest.fixture
def same_as(once, tiny):
    """For each experiment, the first whose settings are the same once model and data are tiny."""

    def make(_):
        firsts, found = {}, {}
        for name in EXPERIMENTS:
            if name.startswith("glue/"):  # each has its own data
                found[name] = name
                continue
            whole = {**asdict(tiny(name)[0]), "arm": None, "run_root": None}
            found[name] = firsts.setdefault(repr(whole), name)
        return found

    return once("experiments that start alike", make)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_starts_in_every_precision(name, same_as, tiny, started):
    """Device, precision, model, optimizer, compilation, memory, checkpoint, random state."""
    if same_as[name] != name:
        return  # that one's test starts it
    for precision in ("fp32", "bf16", "fp16"):
        _, start = started(*tiny(name), precision)
        assert (start["device"], start["precision"]) == ("NVIDIA H100 80GB HBM3", precision)
        assert start["compile"] == ("default" if name.startswith("glue/") else "reduce-overhead")


MADE = [("c4_60m/adamw", "bf16"), ("c4_60m/adafrugal", "fp16"), ("glue/rte", "fp16")]


@pytest.mark.parametrize(("name", "precision"), MADE)
def test_a_run_is_made_and_goes_on(name, precision, gpu, tiny, started, capsys):
    chosen, choices = tiny(name)
    started(chosen, choices, precision)
    gpu.forget()
    record, outcome = run(in_precision(chosen, precision), choices)
    assert outcome == "finished"
    assert gpu.opens_first(), gpu.calls
    assert "set_rng_state" in gpu.calls
    assert "continuing after step 0" in capsys.readouterr().out
    line, summary = record.metrics()[-1], record.summary()
    replays = not name.startswith("glue/")  # graphs allocate nothing, so what is reserved for them counts
    assert line["memory"] == {"allocated": 2**20, "reserved": 2**21, "peak": 2**21 if replays else 2**20}
    assert summary["device"] == "cuda"
    assert summary["memory"]["peak_is"] == ("reserved" if replays else "allocated")
    assert ("mfu" in line) is (not name.startswith("glue/"))


def test_a_run_goes_on_in_the_precision_that_it_began_in(gpu, tiny, started):
    chosen, choices = tiny("embedded/adamw")
    for gpu.has_bf16 in (True, False):
        assert started(chosen, choices, "auto")[1]["precision"] == "bf16"


def test_without_the_opening_call_no_run_starts(gpu, tiny, monkeypatch):
    monkeypatch.setattr(devices, "open_device", lambda *_: devices.Place(torch.device("cuda", 0), "bf16"))
    with pytest.raises(RuntimeError, match="Invalid device argument"):
        run(*tiny("c4_60m/adamw"))


def test_the_micro_batch_is_the_largest_that_fits_by_the_estimate(tiny, started, foretold):
    foretold(2**34)
    _, start = started(*tiny("c4_60m/adamw", "trainer.batch_size=12"))
    assert start["micro_batch_size"] == 4  # 64 GiB and 6.75 kept beyond them, of the 79 that are free
    assert start["compile"] == "default"
    assert start["compile_reason"] == "CUDA graphs need one micro-batch a step: trainer.compile_mode is default"


def test_a_run_starts_where_nothing_can_be_estimated(tiny, started, monkeypatch):
    def fails(settings):
        raise NotImplementedError("no such kernel")

    chosen = tiny("c4_60m/adamw")
    monkeypatch.setattr(estimate, "estimate", fails)
    record, start = started(*chosen)
    assert start["micro_batch_size"] == 2
    (warning,) = [event["text"] for event in record.events() if event["event"] == "warning"]
    assert warning.endswith("since there is no estimate to choose it by: no such kernel")


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch, settings):
    for has_bf16, precision in ((True, "bf16"), (False, "fp32")):
        with stand_in.installed(monkeypatch, has_bf16):
            assert devices.open_device(settings()[0].trainer).precision == precision
