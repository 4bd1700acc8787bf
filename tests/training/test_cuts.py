"""What lowers memory leaves a run as it is, to the bit, or is refused with the reason."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torture import end_of

from adafrugal.models import llama, optimizers
from adafrugal.system.errors import TrainingError
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")

CUTS = {"update_in_backward": True, "activation_checkpointing": "layers"}
HALF = ["model.dtype=bfloat16", "trainer.precision=bf16", "optimizer.stochastic_rounding=true",
        "optimizer.state_dtype=bfloat16"]  # fmt: skip
ARMS = {
    "adafrugal": ["optimizer=adafrugal"],
    "adafrugal, svd": ["optimizer=adafrugal", "optimizer.subspace=svd"],
    "galore": ["optimizer=galore"],
    "badam": ["optimizer=badam", "optimizer.density=0.5"],
    "adamw": ["optimizer=adamw"],
    "adafactor": ["optimizer=adafactor"],
    "muon, of several optimizers": ["optimizer=muon"],
    "weights in bfloat16": HALF,
    "steps left out": ["trainer.on_nonfinite=skip"],
    "selective": ["trainer.precision=bf16"],
    "fine-tuning": ["trainer.clip_norm=null"],
}


def cut(chosen, **cuts):
    return replace(chosen, trainer=replace(chosen.trainer, **cuts or CUTS))


@pytest.fixture
def ended(tmp_path):
    """A function that makes a run under a run_root of its own: settings, choices, its name -> record, how it ends."""

    def make(chosen, choices, name):
        record, outcome = run(replace(chosen, run_root=str(tmp_path / name)), choices)
        assert outcome == "finished"
        end = end_of(tmp_path / name)
        for line in end[0]:
            line.pop("gradient_norm", None)  # an update in the backward pass never has all gradients to measure
        return record, end

    return make


@pytest.mark.parametrize("arm", ARMS)
def test_updates_in_the_backward_pass_and_activations_made_again_change_no_bit(
    arm, settings, finetune_settings, poison, ended
):
    chosen, choices = finetune_settings("rte", *ARMS[arm]) if arm == "fine-tuning" else settings(*ARMS[arm])
    if arm == "steps left out":  # before their gradients are anywhere
        poison(3, 4)
    one, plain = ended(chosen, choices, "plain")
    less = cut(chosen, activation_checkpointing="selective") if arm == "selective" else cut(chosen)
    other, same = ended(less, choices, "cut")
    assert one.directory.name == other.directory.name, "how a run is made is no part of what it is"
    assert plain == same
    for record, has_norms in ((one, True), (other, not less.trainer.update_in_backward)):
        made = [line for line in record.metrics() if str(line["loss"]) != "nan"]  # a step that is left out has none
        assert {"gradient_norm" in line for line in made} == {has_norms}
    summary = other.summary()
    assert summary["skips"] == (2 if arm == "steps left out" else 0)
    assert min(summary["seconds"]["optimizer"], summary["seconds"]["backward"]) > 0


def test_what_only_a_step_finds_out_is_said_in_a_line_there_too(settings):
    chosen, choices = settings("optimizer=galore", "optimizer.density=0.001")
    with pytest.raises(TrainingError, match=r"the optimizer cannot make step 1: a density of 0.001 selects nothing"):
        run(cut(chosen), choices)


def test_weights_in_bfloat16_are_stored_so_and_learn(finished):
    record = finished(*HALF, "trainer.log_every=1")
    newest = max((record.directory / "checkpoints").glob("step-*"))
    assert {tensor.dtype for tensor in load_file(newest / "model.safetensors").values()} == {torch.bfloat16}
    lines = record.metrics()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["state_bytes"] < record.summary()["state_bytes"]["adamw"]


@pytest.mark.parametrize("is_cut_later", [True, False])
def test_a_run_goes_on_with_less_or_more_memory(is_cut_later, settings, monkeypatch, ended):
    """It is the same run: refused memory, it is continued with what lowers it, and ends as it would have."""
    chosen, choices = settings("checkpoint.every=5")
    _, plain = ended(chosen, choices, "plain")
    first, second = (chosen, cut(chosen)) if is_cut_later else (cut(chosen), chosen)
    train_step = Loop._train_step

    def refused(self, work):
        if self.progress.step == 8:
            raise MemoryError
        train_step(self, work)

    with monkeypatch.context() as patched, pytest.raises(TrainingError, match="memory was refused"):
        patched.setattr(Loop, "_train_step", refused)
        ended(first, choices, "cut")
    assert ended(second, choices, "cut")[1] == plain


def test_what_rounds_to_the_nearest_warns(settings):
    chosen, _ = settings("optimizer=adamw", "model.dtype=bfloat16", "trainer.precision=bf16")
    model = llama.build(chosen.model)
    with pytest.warns(UserWarning, match="rounds weights and moments in bfloat16 to the nearest"):
        optimizers.build(chosen, optimizers.groups(chosen, model))
