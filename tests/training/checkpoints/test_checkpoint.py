import errno
import os
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from adafrugal.models import llama
from adafrugal.settings.schema import LlamaSettings
from adafrugal.system.errors import TrainingError
from adafrugal.training.checkpoints import checkpoint, sharded

TINY = LlamaSettings(
    vocabulary_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)


def save(root, step, model, state, keep, best=None):
    def fill():
        place = checkpoint.begin(root, step)
        model.save_pretrained(place)
        return place

    return checkpoint.save(root, step, fill, state, keep, best)


def test_what_is_saved_comes_back_and_transformers_reads_it(tmp_path):
    torch.manual_seed(0)
    model, other = llama.build(TINY), llama.build(TINY)
    save(tmp_path, 7, model, {"step": 7, "moments": torch.arange(3)}, keep=1)
    assert checkpoint.load_state(checkpoint.latest(tmp_path, str))["step"] == 7
    sharded.read_model(checkpoint.latest(tmp_path, str), other)
    again = LlamaForCausalLM.from_pretrained(checkpoint.latest(tmp_path, str))
    for a, b, c in zip(model.parameters(), other.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_newest_are_kept(tmp_path):
    model = llama.build(TINY)
    for step in (5, 90, 100, 1000):
        save(tmp_path, step, model, {}, keep=2)
    assert [d.name for d in sorted(tmp_path.iterdir())] == ["step-00000100", "step-00001000"]
    assert checkpoint.latest(tmp_path, str).name == "step-00001000"


def test_one_that_cannot_be_written_is_one_line_and_leaves_the_one_before(tmp_path, monkeypatch):
    model = llama.build(TINY)
    save(tmp_path, 1, model, {}, keep=1)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(
        TrainingError, match=r"the checkpoint of step 2 cannot be written to .*: No space left on device"
    ):
        save(tmp_path, 2, model, {}, keep=1)
    assert [d.name for d in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path, str).name == "step-00000001"


def test_memory_that_is_refused_for_one_is_no_fault_of_the_disk(tmp_path, monkeypatch):
    """It goes on as it is, so that the run says what lowers memory."""
    model = llama.build(TINY)

    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        save(tmp_path, 2, model, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_an_old_one_that_cannot_be_removed_costs_no_run(tmp_path, monkeypatch):
    """It stays until it can."""
    model = llama.build(TINY)
    save(tmp_path, 1, model, {}, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
        save(tmp_path, 2, model, {}, keep=1)
    assert len(list(tmp_path.iterdir())) == 2
    save(tmp_path, 3, model, {}, keep=1)
    assert [d.name for d in tmp_path.iterdir()] == ["step-00000003"]


def test_what_a_killed_process_left_is_not_seen_and_goes(tmp_path):
    model = llama.build(TINY)
    for name in (".step-00000003.new", ".step-00000090.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    assert checkpoint.latest(tmp_path, str) is None
    save(tmp_path, 3, model, {}, keep=1)
    assert [d.name for d in tmp_path.iterdir()] == ["step-00000003"]


def test_the_best_stays_beside_the_newest(tmp_path):
    model, left = llama.build(TINY), []
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
        save(tmp_path, step, model, {}, keep=1, best=best)
        left.append([int(d.name.removeprefix("step-")) for d in sorted(tmp_path.iterdir())])
    assert left == [[1], [1, 2], [3], [3, 4], [3, 5]]


def test_there_may_be_none(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere", str) is None


def test_one_that_does_not_fit_is_an_error(tmp_path):
    model = llama.build(TINY)
    save(tmp_path, 1, model, {}, keep=1)
    wider = llama.build(replace(TINY, hidden_size=64))
    with pytest.raises(RuntimeError, match="size mismatch"):
        sharded.read_model(checkpoint.latest(tmp_path, str), wider)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_what_would_run_code_is_not_read(tmp_path, monkeypatch, tally):
    """With checksums that are right, since whoever can write the one file can write the other."""
    monkeypatch.chdir(tmp_path)
    model = llama.build(TINY)
    place = save(tmp_path, 1, model, {"account": Evil()}, keep=1)
    assert checkpoint.latest(tmp_path, str) == place
    with pytest.raises(
        TrainingError, match=r"state\.pt is not read, since it holds more than tensors and plain values"
    ):
        checkpoint.load_state(place)
    assert not (tmp_path / "executed").exists()
    tally("faults: a checkpoint that would run code")


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_checksums_of_nothing_make_nothing_whole(tmp_path):
    model, said = llama.build(TINY), []
    for step in (1, 2):
        save(tmp_path, step, model, {}, keep=2)
    (tmp_path / "step-00000002" / "checksums.json").write_text("{}")
    assert checkpoint.latest(tmp_path, said.append).name == "step-00000001"
    assert "(checksums.json is not whole)" in said[0]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "state.pt", "checksums.json"])
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path, name, damage, tally):
    model, said = llama.build(TINY), []
    for step in (1, 2):
        save(tmp_path, step, model, {"step": step}, keep=2)
    damage(tmp_path / "step-00000002" / name)
    assert checkpoint.latest(tmp_path, said.append).name == "step-00000001"
    assert len(said) == 1
    assert "step-00000002 is damaged (" in said[0]
    assert name in said[0] or name == "checksums.json"
    tally("faults: a damaged file of a checkpoint")


def test_a_damaged_one_takes_nobodys_place(tmp_path):
    """A run goes on from the one before, and is stopped again before it is where the damaged one was."""
    model = llama.build(TINY)
    for step in (80, 100):
        save(tmp_path, step, model, {}, keep=2)
    _flip(tmp_path / "step-00000100" / "state.pt")
    assert checkpoint.latest(tmp_path, str).name == "step-00000080"
    save(tmp_path, 90, model, {}, keep=1)
    assert checkpoint.latest(tmp_path, str).name == "step-00000090"
    save(tmp_path, 100, model, {}, keep=1)
    assert checkpoint.latest(tmp_path, str).name == "step-00000100"


def test_where_all_are_damaged_nothing_begins_anew_by_itself(tmp_path):
    model, said = llama.build(TINY), []
    for step in (1, 2):
        save(tmp_path, step, model, {}, keep=2)
        _flip(tmp_path / f"step-{step:08d}" / "state.pt")
    with pytest.raises(TrainingError, match=r"none of the 2 checkpoints in .* can be read; remove the run's"):
        checkpoint.latest(tmp_path, said.append)
    assert len(said) == 2
    with pytest.raises(TrainingError, match="none of the 2 checkpoints"):  # nor at the next try
        checkpoint.latest(tmp_path, said.append)
