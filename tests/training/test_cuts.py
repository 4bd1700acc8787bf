"""What lowers memory leaves a run as it is, to the bit, or is refused with the reason."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torture import end_of

from adafrugal.models import llama, optimizers
from adafrugal.system.errors import TrainingError
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

pytestmark = pytest.mark.usefixtures("no_estimate")

CUTS = ["trainer.update_in_backward=true", "trainer.activation_checkpointing=layers"]
ARMS = {
    "adafrugal": ["optimizer=adafrugal"],
    "adafrugal, svd": ["optimizer=adafrugal", "optimizer.subspace=svd"],
    "galore": ["optimizer=galore"],
    "badam": ["optimizer=badam", "optimizer.density=0.5"],
    "adamw": ["optimizer=adamw"],
    "adafactor": ["optimizer=adafactor"],
    "muon, of several optimizers": ["optimizer=muon"],
    "weights in bfloat16": [
        "optimizer=adafrugal", "model.dtype=bfloat16", "trainer.precision=bf16", "optimizer.stochastic_rounding=true",
        "optimizer.state_dtype=bfloat16",
    ],
}  # fmt: skip


def ended(chosen, choices, place, *more):
    """How a run ends under a run_root of its own."""
    record, outcome = run(replace(chosen, run_root=str(place)), choices)
    assert outcome == "finished"
    return record, end_of(place)


@pytest.mark.parametrize("arm", ARMS)
def test_updates_in_the_backward_pass_and_activations_made_again_change_no_bit(arm, settings, tmp_path):
    base, choices = settings(*ARMS[arm])
    cut, _ = settings(*ARMS[arm], *CUTS)
    one, plain = ended(base, choices, tmp_path / "plain")
    other, same = ended(cut, choices, tmp_path / "cut")
    assert one.directory.name == other.directory.name, "how a run is made is no part of what it is"
    assert plain == same
    seconds = other.summary()["seconds"]
    assert seconds["optimizer"] > 0
    assert seconds["backward"] > 0


def test_selective_checkpointing_changes_no_bit_either(settings, tmp_path):
    base, choices = settings("trainer.precision=bf16")
    cut, _ = settings("trainer.precision=bf16", "trainer.activation_checkpointing=selective")
    assert ended(base, choices, tmp_path / "plain")[1] == ended(cut, choices, tmp_path / "cut")[1]


def test_so_it_is_in_fine_tuning(finetune_settings, tmp_path):
    base, choices = finetune_settings("rte", "trainer.clip_norm=null")
    cut, _ = finetune_settings("rte", "trainer.clip_norm=null", *CUTS)
    assert ended(base, choices, tmp_path / "plain")[1] == ended(cut, choices, tmp_path / "cut")[1]


def test_a_step_is_left_out_before_its_gradients_are_anywhere(settings, poison, tmp_path):
    poison(3, 4)
    base, choices = settings("trainer.on_nonfinite=skip")
    cut, _ = settings("trainer.on_nonfinite=skip", *CUTS)
    record, plain = ended(base, choices, tmp_path / "plain")
    assert record.summary()["skips"] == 2
    assert ended(cut, choices, tmp_path / "cut")[1] == plain


def test_what_only_a_step_finds_out_is_said_in_a_line_there_too(settings):
    chosen, choices = settings("optimizer=galore", "optimizer.density=0.001", *CUTS)
    with pytest.raises(TrainingError, match=r"the optimizer cannot make step 1: a density of 0.001 selects nothing"):
        run(chosen, choices)


def test_weights_in_bfloat16_are_stored_so_and_learn(settings, tmp_path):
    chosen, choices = settings(*ARMS["weights in bfloat16"], "trainer.log_every=1")
    record, _ = ended(chosen, choices, tmp_path / "plain")
    newest = max(Path(record.directory / "checkpoints").glob("step-*"))
    assert {tensor.dtype for tensor in load_file(newest / "model.safetensors").values()} == {torch.bfloat16}
    lines = record.metrics()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["state_bytes"] < record.summary()["state_bytes"]["adamw"]


@pytest.mark.parametrize("begun", [[], CUTS])
def test_a_run_goes_on_with_less_or_more_memory(begun, settings, monkeypatch, tmp_path):
    """It is the same run: refused memory, it is continued with what lowers it, and ends as it would have."""
    base, choices = settings("checkpoint.every=5")
    _, plain = ended(base, choices, tmp_path / "plain")
    first, _ = settings("checkpoint.every=5", *begun)
    second, _ = settings("checkpoint.every=5", *([] if begun else CUTS))
    train_step = Loop._train_step

    def refused(self, work):
        if self.progress.step == 8:
            raise MemoryError
        train_step(self, work)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_train_step", refused)
        with pytest.raises(TrainingError, match="memory was refused"):
            run(replace(first, run_root=str(tmp_path / "cut")), choices)
    assert ended(second, choices, tmp_path / "cut")[1] == plain


def test_what_rounds_to_the_nearest_warns(settings):
    chosen, _ = settings("optimizer=adamw", "model.dtype=bfloat16", "trainer.precision=bf16")
    model = llama.build(chosen.model)
    with pytest.warns(UserWarning, match="rounds weights and moments in bfloat16 to the nearest"):
        optimizers.build(chosen, optimizers.groups(chosen, model))
