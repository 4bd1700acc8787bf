import errno
import os
from dataclasses import replace

import pytest
import torch
from tiny import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from adafrugal.models import llama
from adafrugal.system.errors import TrainingError
from adafrugal.training.checkpoints import checkpoint, sharded
from adafrugal.training.checkpoints.writer import Writer
from adafrugal.training.distributed.ranks import Ranks


@pytest.fixture
def save(tmp_path, model):
    """A function that saves a checkpoint and waits for it: its step and what differs -> its directory."""

    def make(step, state=(), keep=1, best=None, model=model):
        writer = Writer(tmp_path, keep, Ranks(), is_sharded=False)
        writer.save(step, model, {}, dict(state), best, begun=0.0)
        writer.wait()
        return tmp_path / checkpoint.name(step)

    return make


def names(root):
    return sorted(d.name for d in root.iterdir())


def raises(error):
    def call(*_, **__):
        raise error

    return call


def test_what_is_saved_comes_back_and_transformers_reads_it(tmp_path, model, save):
    place, other = save(7, {"step": 7, "moments": torch.arange(3)}), llama.build(TINY)
    assert checkpoint.latest(tmp_path, str) == place
    assert checkpoint.load_state(place)["moments"].tolist() == [0, 1, 2]
    sharded.read_model(place, other)
    again = LlamaForCausalLM.from_pretrained(place)
    for a, b, c in zip(model.parameters(), other.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_checkpoint_of_a_tied_model_is_whole(save):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tied = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    again = LlamaForCausalLM.from_pretrained(save(1, model=tied))
    assert all(torch.equal(a, b) for a, b in zip(tied.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("keep", "saved", "left"),  # saved: the step of each, and of the best until then
    [
        (2, [(5, None), (90, None), (100, None), (1000, None)], [[5], [5, 90], [90, 100], [100, 1000]]),
        (1, [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3)], [[1], [1, 2], [3], [3, 4], [3, 5]]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, save, keep, saved, left):
    for (step, best), steps in zip(saved, left, strict=True):
        save(step, keep=keep, best=best)
        assert names(tmp_path) == [checkpoint.name(step) for step in steps]
    assert checkpoint.latest(tmp_path, str).name == checkpoint.name(left[-1][-1])


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (OSError(errno.ENOSPC, "No room"), TrainingError, r"checkpoint step-00000002 cannot be written to .*: No room"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "can't allocate memory"),
    ],
)
def test_one_that_cannot_be_written_leaves_the_one_before(tmp_path, save, monkeypatch, error, raised, says):
    """A refused allocation stays as it is, so that the run says what lowers memory."""
    before = save(1)
    monkeypatch.setattr(torch, "save", raises(error))
    with pytest.raises(raised, match=says):
        save(2)
    assert names(tmp_path) == [before.name]
    assert checkpoint.latest(tmp_path, str) == before


def test_an_old_one_that_cannot_be_removed_stays_until_it_can(tmp_path, save, monkeypatch):
    save(1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", raises(PermissionError(errno.EPERM, "no")))
        save(2)
    assert len(names(tmp_path)) == 2
    save(3)
    assert names(tmp_path) == ["step-00000003"]


def test_what_a_killed_process_left_is_not_seen_and_goes(tmp_path, save):
    for name in (".step-00000003.new", ".step-00000090.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    assert checkpoint.latest(tmp_path, str) is checkpoint.latest(tmp_path / "nowhere", str) is None
    save(3)
    assert names(tmp_path) == ["step-00000003"]


def test_one_that_does_not_fit_is_an_error(save):
    wider = llama.build(replace(TINY, hidden_size=64))
    with pytest.raises(RuntimeError, match="size mismatch"):
        sharded.read_model(save(1), wider)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_what_would_run_code_is_not_read(tmp_path, save, monkeypatch, tally):
    """With checksums that are right, since whoever can write the one file can write the other."""
    monkeypatch.chdir(tmp_path)
    place = save(1, {"account": Evil()})
    assert checkpoint.latest(tmp_path, str) == place
    with pytest.raises(TrainingError, match=r"state\.pt is not read, since it holds more than tensors and plain val"):
        checkpoint.load_state(place)
    assert not (tmp_path / "executed").exists()
    tally("faults: a checkpoint that would run code")


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": _flip,
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
}
FILES = ("model.safetensors", "config.json", "state.pt", "checksums.json")
DAMAGED = [(name, damage) for name in FILES for damage in DAMAGES.values()]


@pytest.mark.parametrize(("name", "damage"), [*DAMAGED, ("checksums.json", lambda file: file.write_text("{}"))])
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path, save, name, damage, tally):
    said = []
    for step in (1, 2):
        save(step, keep=2)
    damage(tmp_path / "step-00000002" / name)
    assert checkpoint.latest(tmp_path, said.append).name == "step-00000001"
    (warning,) = said
    assert "step-00000002 is damaged (" in warning
    assert name in warning or name == "checksums.json"
    tally("faults: a damaged file of a checkpoint")


def test_a_damaged_one_takes_nobodys_place(tmp_path, save):
    """A run goes on from the one before, and is stopped again before it is where the damaged one was."""
    for step in (80, 100):
        save(step, keep=2)
    _flip(tmp_path / "step-00000100" / "state.pt")
    assert checkpoint.latest(tmp_path, str).name == "step-00000080"
    for step in (90, 100):
        assert checkpoint.latest(tmp_path, str) != save(step) == checkpoint.latest(tmp_path, str)


def test_where_all_are_damaged_nothing_begins_anew_by_itself(tmp_path, save):
    said = []
    for step in (1, 2):
        _flip(save(step, keep=2) / "state.pt")
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"none of the 2 checkpoints in .* can be read; remove the run's"):
            checkpoint.latest(tmp_path, said.append)
    assert len(said) == 4
