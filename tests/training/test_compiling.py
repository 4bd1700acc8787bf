"""Compiled forward and backward passes: when, in which mode, and that nothing else changes."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import stand_in
import torch
from labelled_sets import write_encoder
from torture import LONG
from transformers import LlamaForCausalLM

from adafrugal.settings.schema import TrainerSettings
from adafrugal.training import compiling
from adafrugal.training.devices import Place
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")

GPU, CPU = (Place(torch.device(kind), "bf16") for kind in ("cuda", "cpu"))
FEW = ("model.num_hidden_layers=1", "trainer.steps=4", "eval.every=2", "eval.tokens=700")
HALVED = {"batch_size": 8, "micro_batch_size": 4}


@pytest.mark.parametrize(
    ("trainer", "place", "reason"),
    [
        ({}, CPU, "the device is a CPU"),
        ({"compile": False}, GPU, "trainer.compile is false"),
        ({"update_in_backward": True}, GPU, "trainer.update_in_backward needs gradients one by one"),
        ({}, GPU, None),
        ({"compile": True}, CPU, None),
    ],
)
def test_auto_compiles_on_a_gpu(trainer, place, reason):
    found = compiling._why_not(TrainerSettings(**trainer), place)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(
    ("trainer", "place", "mode", "needs"),
    [
        ({}, GPU, "reduce-overhead", None),
        ({"compile_mode": "max-autotune"}, GPU, "max-autotune", None),
        ({"compile_mode": "default"}, GPU, "default", None),
        ({}, CPU, "default", "a GPU"),
        (HALVED, GPU, "default", "one micro-batch a step"),
        (HALVED | {"compile_mode": "max-autotune"}, GPU, "max-autotune-no-cudagraphs", "one micro-batch"),
        ({}, GPU, "default", "batches of one shape"),
        ({"parallel": "ddp"}, GPU, "default", "one process"),
        ({"activation_checkpointing": "layers"}, GPU, "default", "trainer.activation_checkpointing=none"),
    ],
)
def test_cuda_graphs_are_recorded_where_that_is_safe(trainer, place, mode, needs):
    task = SimpleNamespace(place=place, shapes_vary=needs == "batches of one shape")
    found, reason = compiling._mode(task, TrainerSettings(**trainer))
    assert found == mode
    assert reason is None if needs is None else f"CUDA graphs need {needs}" in reason


def raises(error):
    def call(*_):
        raise error

    return call


def warnings_of(record):
    return [event["text"] for event in record.events() if event["event"] == "warning"]


@pytest.fixture
def both(monkeypatch):
    """A function that makes a run as it is and compiled, in whose steps nothing more may be compiled.

    Takes settings, choices, and what stands for torch.compile: its own, unless given.
    """
    fit = Loop.fit

    def without_compiling(loop, stop):
        with torch._dynamo.config.patch(error_on_recompile=True):
            return fit(loop, stop)

    def make(chosen, choices, compiler=torch.compile):
        plain, _ = run(chosen, choices)
        monkeypatch.setattr(torch, "compile", compiler)
        monkeypatch.setattr(Loop, "fit", without_compiling)
        trainer = replace(chosen.trainer, compile=True)
        record, outcome = run(replace(chosen, run_root=f"{chosen.run_root}-compiled", trainer=trainer), choices)
        assert outcome == "finished"
        assert record.directory.name == plain.directory.name
        return plain, record

    return make


def assert_alike(record, plain, rel):
    for ours, theirs in zip(record.metrics(), plain.metrics(), strict=True):
        for name in ("loss", "validation_loss"):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=rel, abs=0)


@pytest.mark.parametrize("optimizer", ["adafrugal", *(["lora"] if LONG else [])])
def test_an_encoder_is_compiled_once_for_batches_of_all_lengths(optimizer, both, finetune_settings, tmp_path):
    """Traced and guarded as by torch's own compiler, but without writing and compiling C++."""
    pytest.importorskip("peft" if optimizer == "lora" else "torch")
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # compiled code draws its own
    encoder = write_encoder(tmp_path / "bert", num_hidden_layers=1, **dropout)
    words = [f"optimizer={optimizer}", f"model.name={encoder}", "trainer.epochs=1", "trainer.batch_size=4"]
    how = {} if LONG else {"backend": "aot_eager", "mode": None}
    compiler = torch.compile
    plain, record = both(*finetune_settings("rte", *words), lambda function, **given: compiler(function, **given | how))
    assert record.summary()["compile"] == "default"
    assert_alike(record, plain, rel=1e-4)


def test_a_compiled_run_is_the_same_run_and_no_step_compiles(settings, both):
    """In bf16, with chunks of the loss, documents kept apart, and an evaluation whose rows do not fill a batch."""
    words = (*FEW, "trainer.precision=bf16", "model.loss_chunk_rows=300", "data.mask_documents=true")
    plain, record = both(*settings(*words))
    assert_alike(record, plain, rel=1e-3)
    summary = record.summary()
    assert (summary["compile"], plain.summary()["compile"]) == ("default", None)
    assert summary["seconds"]["compile"] > summary["seconds"]["forward"]
    assert "compile" not in plain.summary()["seconds"]
    LlamaForCausalLM.from_pretrained(next(record.directory.glob("checkpoints/*")))


def fails_in_evaluation(function, **_):
    return lambda *tensors: function(*tensors) if torch.is_grad_enabled() else raises(RuntimeError("no such graph"))()


@pytest.mark.parametrize(
    ("compiler", "mode"), [(lambda function, **_: function, "default"), (fails_in_evaluation, None)]
)
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_rehearsal_leaves_no_trace(name, settings, finetune_settings, both, compiler, mode):
    """Dropout draws, in an encoder, are those of a run that was not rehearsed; so are weights and gradients."""
    plain, record = both(
        *finetune_settings("rte", "trainer.epochs=1") if name == "finetune" else settings(*FEW), compiler
    )
    assert record.summary()["compile"] == mode
    assert_alike(record, plain, rel=0)


def test_where_nothing_can_be_compiled_one_warning_says_so_and_the_run_goes_on(finished, cache_root, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: raises(RuntimeError("no compiler found\nand much more")))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    record = finished(*FEW, "trainer.compile=true")
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == f"{cache_root}/compiled"
    (warning,) = warnings_of(record)
    assert warning == "torch.compile does not work here (no compiler found); trainer.compile is false from here on"
    assert record.summary()["compile"] is None


def test_memory_that_compiled_code_is_refused_is_no_reason_to_go_on_without_it(settings, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: raises(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="memory was refused"):
        run(*settings(*FEW, "trainer.compile=true"))


def test_memory_that_is_refused_to_graphs_is_asked_for_without_them(finished, monkeypatch):
    modes = []

    def compiler(function, mode, **_):
        modes.append(mode)
        return raises(torch.OutOfMemoryError("CUDA out of memory")) if mode == "reduce-overhead" else function

    with stand_in.installed(monkeypatch):
        monkeypatch.setattr(torch, "compile", compiler)
        record = finished(*FEW, "trainer.batch_size=2", "trainer.micro_batch_size=2")
    assert modes == ["reduce-overhead", "default"]
    assert record.summary()["compile"] == "default"
    refused = "memory for CUDA graphs was refused (CUDA out of memory): trainer.compile_mode is default"
    assert warnings_of(record) == [refused]


def test_every_run_of_a_long_sweep_is_compiled(settings, monkeypatch):
    """torch compiles one function for so many models and then, without an error, none."""
    compile_, graphs = torch.compile, []
    monkeypatch.setattr(
        torch, "compile",
        lambda function, **_: compile_(function, backend=lambda graph, inputs: graphs.append(graph) or graph.forward),
    )  # fmt: skip
    chosen, choices = settings(*FEW, "optimizer=adamw", "trainer.steps=1", "trainer.compile=true")
    with torch._dynamo.config.patch(recompile_limit=2):
        for seed in range(4):
            graphs.clear()
            record, _ = run(replace(chosen, seed=seed), choices)
            assert graphs
            assert record.summary()["compile"] == "default"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["trainer.precision=fp16", "trainer.clip_norm=1.0"],
        ["trainer.on_nonfinite=skip", "model.loss_chunk_rows=100", "data.mask_documents=true"],
        ["trainer.micro_batch_size=4"],
    ],
    ids=" ".join,
)
def test_on_a_gpu_graphs_make_the_same_run(more, settings):
    words = (*FEW, "trainer.steps=8", "trainer.device=cuda", "trainer.precision=bf16", "optimizer.interval=3", *more)
    plain, _ = run(*settings(*words, "trainer.compile=false"))
    chosen, choices = settings(*words)
    record, _ = run(replace(chosen, run_root=f"{chosen.run_root}-compiled"), choices)
    mode = "default" if "trainer.micro_batch_size=4" in more else "reduce-overhead"
    assert (record.summary()["compile"], plain.summary()["compile"]) == (mode, None)
    assert_alike(record, plain, rel=1e-2)
