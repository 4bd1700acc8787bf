"""Every experiment starts on a GPU: on a stand-in for torch.cuda, which raises where a call comes too early."""

from dataclasses import replace
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
def tiny(settings, finetune_settings, monkeypatch):
    """A function that gives an experiment's settings with a tiny model and tiny data: name, overrides -> …"""
    foretold = estimate.Estimate(1, 1, (estimate.Stage(None, {}, PEAK),))
    monkeypatch.setattr(estimate, "estimate", lambda settings: foretold)  # a minute for all of them, and no CUDA in it

    def make(name, *overrides):
        few = ["trainer.batch_size=2", "trainer.micro_batch_size=null", "eval.tokens=64", *overrides]
        if name.startswith("glue/"):
            return finetune_settings(name.removeprefix("glue/").partition("_")[0], *few)
        text = ["data=embedded", "trainer.steps=2", "eval.every=2", "model.num_hidden_layers=4"]
        text += [] if name.startswith("embedded/") else ["schedule.cycle=null", "schedule.warmup=null"]
        return settings(f"experiments={name}", *text, *few)

    return make


def in_precision(chosen, precision):
    return replace(chosen, trainer=replace(chosen.trainer, precision=precision))


def save_at_once(loop, stop):
    loop._save()
    loop._note(loop._writer.wait())
    return False


def last_start(record):
    return [event for event in record.events() if event["event"] == "start"][-1]


def test_there_are_experiments_of_every_kind():
    assert {"c4_60m/adamw", "c4_1b/adafrugal", "glue/rte", "subspaces/svd", "vietvault_130m/frugal"} <= {*EXPERIMENTS}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_starts_in_every_precision(name, gpu, tiny, monkeypatch):
    """Device, precision, model, optimizer, compilation, memory, checkpoint, random state."""
    chosen, choices = tiny(name)
    monkeypatch.setattr(Loop, "fit", save_at_once)
    for precision in ("fp32", "bf16", "fp16"):
        gpu.forget()
        record, outcome = run(in_precision(chosen, precision), choices)
        assert outcome == "interrupted"
        assert gpu.opens_first(), gpu.calls
        start = last_start(record)
        assert (start["device"], start["precision"]) == ("NVIDIA H100 80GB HBM3", precision)
        assert start["compile"] == ("default" if name.startswith("glue/") else "reduce-overhead")


MADE = [("c4_60m/adamw", "bf16"), ("c4_60m/adafrugal", "fp16"), ("glue/rte", "fp16")]


@pytest.mark.parametrize(("name", "precision"), MADE)
def test_a_run_is_made_and_goes_on(name, precision, gpu, tiny, monkeypatch):
    chosen, choices = tiny(name)
    chosen = in_precision(chosen, precision)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "fit", save_at_once)
        assert run(chosen, choices)[1] == "interrupted"
    gpu.forget()
    record, outcome = run(chosen, choices)
    assert outcome == "finished"
    assert gpu.opens_first(), gpu.calls
    assert "set_rng_state" in gpu.calls
    line, summary = record.metrics()[-1], record.summary()
    replays = not name.startswith("glue/")  # graphs allocate nothing, so what is reserved for them counts
    assert line["memory"] == {"allocated": 2**20, "reserved": 2**21, "peak": 2**21 if replays else 2**20}
    assert summary["device"] == "cuda"
    assert summary["memory"]["peak_is"] == ("reserved" if replays else "allocated")
    assert ("mfu" in line) is (not name.startswith("glue/"))


def test_without_the_opening_call_no_run_starts(gpu, tiny, monkeypatch):
    monkeypatch.setattr(devices, "open_device", lambda *_: devices.Place(torch.device("cuda", 0), "bf16"))
    with pytest.raises(RuntimeError, match="Invalid device argument"):
        run(*tiny("c4_60m/adamw"))


def test_the_micro_batch_is_the_largest_that_fits_by_the_estimate(gpu, tiny, monkeypatch):
    asked = []

    def foretold(settings):
        rows = settings.trainer.micro_batch_size
        asked.append(rows)
        peak = replace(PEAK, activations=rows * 2**33, temporaries=rows * 2**33)  # 16 GiB a row
        return estimate.Estimate(1, 1, (estimate.Stage(None, {}, peak),))

    chosen, choices = tiny("c4_60m/adamw", "trainer.batch_size=12", "trainer.micro_batch_size=null")
    monkeypatch.setattr(estimate, "estimate", foretold)
    monkeypatch.setattr(Loop, "fit", save_at_once)
    record, _ = run(chosen, choices)
    start = last_start(record)
    assert start["micro_batch_size"] == 4  # 64 of the 79 ÷ 1.15 GiB that are free
    assert asked[:2] == [12, 4]
    assert start["compile"] == "default"
    assert start["compile_reason"] == "CUDA graphs need one micro-batch a step: trainer.compile_mode is default"


def test_a_run_starts_where_nothing_can_be_estimated(gpu, tiny, monkeypatch):
    def fails(settings):
        raise NotImplementedError("no such kernel")

    chosen, choices = tiny("c4_60m/adamw")
    monkeypatch.setattr(estimate, "estimate", fails)
    monkeypatch.setattr(Loop, "fit", save_at_once)
    record, _ = run(chosen, choices)
    assert last_start(record)["micro_batch_size"] == 2
    (warning,) = [event["text"] for event in record.events() if event["event"] == "warning"]
    assert warning.endswith("since there is no estimate to choose it by: no such kernel")


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch, settings):
    chosen, _ = settings("trainer.precision=auto")
    for has_bf16, precision in ((True, "bf16"), (False, "fp32")):
        with stand_in.installed(monkeypatch, has_bf16):
            assert devices.open_device(chosen.trainer).precision == precision
