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


def task(**more):
    return SimpleNamespace(**{"shapes_vary": False} | more)


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
    ("given", "trainer", "place", "mode", "needs"),
    [
        (task(), {}, GPU, "reduce-overhead", None),
        (task(), {"compile_mode": "max-autotune"}, GPU, "max-autotune", None),
        (task(), {"compile_mode": "default"}, GPU, "default", None),
        (task(), {}, CPU, "default", "a GPU"),
        (task(), HALVED, GPU, "default", "one micro-batch a step"),
        (task(), HALVED | {"compile_mode": "max-autotune"}, GPU, "max-autotune-no-cudagraphs", "one micro-batch"),
        (task(shapes_vary=True), {}, GPU, "default", "batches of one shape"),
        (task(), {"parallel": "ddp"}, GPU, "default", "one process"),
        (task(), {"activation_checkpointing": "layers"}, GPU, "default", "trainer.activation_checkpointing=none"),
    ],
)
def test_cuda_graphs_are_recorded_where_that_is_safe(given, trainer, place, mode, needs):
    found, reason = compiling._mode(given, TrainerSettings(**trainer), place)
    assert found == mode
    assert reason is None if needs is None else f"CUDA graphs need {needs}" in reason


@pytest.fixture
def both(monkeypatch):
    """A function that makes a run as it is and compiled, in whose steps nothing more may be compiled."""
    fit = Loop.fit

    def without_compiling(loop, stop):
        with torch._dynamo.config.patch(error_on_recompile=True):
            return fit(loop, stop)

    def make(chosen, choices, with_code=True):
        # without code: traced and guarded as torch's own compiler does, but no C++ is written and compiled
        how = {} if with_code or LONG else {"backend": "aot_eager", "mode": None}
        plain, _ = run(chosen, choices)
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **given: compile_(function, **given | how))
        monkeypatch.setattr(Loop, "fit", without_compiling)
        trainer = replace(chosen.trainer, compile=True)
        record, outcome = run(replace(chosen, run_root=f"{chosen.run_root}-compiled", trainer=trainer), choices)
        assert outcome == "finished"
        assert record.directory.name == plain.directory.name
        return plain, record

    return make


@pytest.mark.parametrize("optimizer", ["adafrugal", "lora"])
def test_an_encoder_is_compiled_once_for_batches_of_all_lengths(optimizer, both, finetune_settings, tmp_path):
    pytest.importorskip("peft" if optimizer == "lora" else "torch")
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # compiled code draws its own
    encoder = write_encoder(tmp_path / "bert", **dropout)
    words = [f"optimizer={optimizer}", f"model.name={encoder}", "trainer.epochs=1", "trainer.batch_size=4"]
    plain, record = both(*finetune_settings("rte", *words), with_code=False)
    assert record.summary()["compile"] == "default"
    for ours, theirs in zip(record.metrics(), plain.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_compiled_run_is_the_same_run_and_no_step_compiles(settings, both):
    """In bf16, with chunks of the loss, documents kept apart, and an evaluation whose rows do not fill a batch."""
    words = (*FEW, "trainer.precision=bf16", "model.loss_chunk_rows=100", "data.mask_documents=true")
    plain, record = both(*settings(*words))
    for ours, theirs in zip(record.metrics(), plain.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-3)
    summary = record.summary()
    assert (summary["compile"], plain.summary()["compile"]) == ("default", None)
    assert summary["seconds"]["compile"] > summary["seconds"]["forward"]
    assert "compile" not in plain.summary()["seconds"]
    LlamaForCausalLM.from_pretrained(next(record.directory.glob("checkpoints/*")))


def test_where_nothing_can_be_compiled_one_warning_says_so_and_the_run_goes_on(settings, monkeypatch):
    def broken(function, **_):
        def raises(*_):
            raise RuntimeError("no compiler found\nand much more")

        return raises

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    chosen, choices = settings(*FEW, "trainer.compile=true")
    record, outcome = run(chosen, choices)
    assert outcome == "finished"
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == f"{chosen.cache_root}/compiled"
    (warning,) = [event["text"] for event in record.events() if event["event"] == "warning"]
    assert warning == "torch.compile does not work here (no compiler found); trainer.compile is false from here on"
    assert record.summary()["compile"] is None


def test_memory_that_compiled_code_is_refused_is_no_reason_to_go_on_without_it(settings, monkeypatch):
    def refuses(function, **_):
        def raises(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return raises

    monkeypatch.setattr(torch, "compile", refuses)
    chosen, choices = settings(*FEW, "trainer.compile=true")
    with pytest.raises(RuntimeError, match="memory was refused"):
        run(chosen, choices)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_rehearsal_leaves_no_trace(name, settings, finetune_settings, monkeypatch):
    """Dropout draws, in an encoder, are those of a run that was not rehearsed; so are weights and gradients."""
    chosen, choices = finetune_settings("rte", "trainer.epochs=1") if name == "finetune" else settings(*FEW)
    plain, _ = run(chosen, choices)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainer = replace(chosen.trainer, compile=True)
    record, _ = run(replace(chosen, trainer=trainer, run_root=f"{chosen.run_root}-compiled"), choices)
    assert record.summary()["compile"] == "default"
    for ours, theirs in zip(record.metrics(), plain.metrics(), strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["validation_loss"] == theirs["validation_loss"] if "validation_loss" in theirs else True


def test_an_evaluation_that_cannot_be_compiled_leaves_dropout_gradients_and_draws_alone(finetune_settings, monkeypatch):
    chosen, choices = finetune_settings("rte", "trainer.epochs=1", "trainer.device=cpu")
    plain, _ = run(chosen, choices)

    def fails_in_evaluation(function, **_):
        def compiled(*tensors):
            if not torch.is_grad_enabled():
                raise RuntimeError("no such graph")
            return function(*tensors)

        return compiled

    monkeypatch.setattr(torch, "compile", fails_in_evaluation)
    trainer = replace(chosen.trainer, compile=True)
    record, _ = run(replace(chosen, trainer=trainer, run_root=f"{chosen.run_root}-compiled"), choices)
    assert record.summary()["compile"] is None
    assert [line["loss"] for line in record.metrics()] == [line["loss"] for line in plain.metrics()]


def test_every_run_of_a_long_sweep_is_compiled(settings, monkeypatch):
    """torch compiles one function for eight models and then, without an error, none."""
    compile_, graphs = torch.compile, []

    def counts(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=counts))
    for seed in range(10):
        graphs.clear()
        words = (*FEW, "optimizer=adamw", "trainer.steps=1", "trainer.compile=true", f"seed={seed}")
        record, _ = run(*settings(*words))
        assert graphs
        assert record.summary()["compile"] == "default"


def test_memory_that_is_refused_to_graphs_is_asked_for_without_them(settings, monkeypatch):
    modes = []

    def refuses(function, mode, **_):
        def compiled(*tensors):
            modes.append(mode)
            if mode == "reduce-overhead":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*tensors)

        return compiled

    with stand_in.installed(monkeypatch):
        monkeypatch.setattr(torch, "compile", refuses)
        words = [*FEW, "trainer.batch_size=2", "trainer.micro_batch_size=2"]
        record, outcome = run(*settings(*words))
    assert outcome == "finished"
    assert modes[:2] == ["reduce-overhead", "default"]
    assert record.summary()["compile"] == "default"
    warnings = [event["text"] for event in record.events() if event["event"] == "warning"]
    assert warnings == ["memory for CUDA graphs was refused (CUDA out of memory): trainer.compile_mode is default"]


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
    for ours, theirs in zip(record.metrics(), plain.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
