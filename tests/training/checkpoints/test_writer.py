import os
import threading
from collections import OrderedDict

import pytest
import torch

from adafrugal.system.errors import TrainingError
from adafrugal.training.checkpoints import checkpoint, sharded
from adafrugal.training.checkpoints.writer import Staging, Writer
from adafrugal.training.distributed.ranks import Ranks


def test_a_copy_has_the_same_values_and_other_memory():
    tensor = torch.arange(12.0).view(3, 4)
    value = {"a": [tensor.t(), (tensor[1:], 3)], "b": OrderedDict(c=torch.tensor(2, dtype=torch.int8)), "d": "text"}
    value["empty"] = [torch.empty(0), torch.empty(0, 3, dtype=torch.bfloat16)]
    found = Staging().copy(value)
    assert torch.equal(found["a"][0], tensor.t())
    assert found["a"][0].stride() == tensor.t().stride()
    assert found["b"]["c"].dtype == torch.int8
    assert isinstance(found["b"], OrderedDict)
    assert (found["a"][1][1], found["d"]) == (3, "text")
    assert [(t.shape, t.dtype) for t in found["empty"]] == [(t.shape, t.dtype) for t in value["empty"]]
    tensor.zero_()
    assert found["a"][1][0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_what_shares_memory_shares_it_in_the_copy(tmp_path):
    """Moments of several matrices are parts of one tensor: a file must not have it once for each."""
    whole = torch.zeros(1_000_000)
    torch.save(Staging().copy({"parts": list(whole.split(1000))}), tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 1.5 * whole.nbytes


def test_memory_is_used_again_and_given_up_when_it_no_longer_fits():
    staging = Staging()
    first = staging.copy([torch.zeros(1000), torch.zeros(1000), torch.zeros(500)])
    places = {t.data_ptr() for t in first}
    again = staging.copy([torch.ones(1000), torch.ones(500), torch.ones(1000)])
    assert {t.data_ptr() for t in again} == places
    assert all((t == 1).all() for t in again)
    less = staging.copy([torch.zeros(500), torch.zeros(400)])
    assert less[0].data_ptr() in places
    assert sum(storage.nbytes() for storage in staging._spare) == 900 * 4


def test_what_the_training_does_meanwhile_is_not_in_it(tmp_path, model, monkeypatch):
    """The copy is of the moment of `save`; the training goes on while it is written."""
    may_write, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: may_write.wait(60) and save(*given))
    writer, moments = Writer(tmp_path, 1, Ranks(), is_sharded=False), torch.ones(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert writer.save(3, model, {}, {"moments": moments}, None, 0.0) is None
    assert writer.done() is None
    with torch.no_grad():
        moments.zero_()
        for parameter in model.parameters():
            parameter.zero_()
    may_write.set()
    written = writer.wait()
    assert (written.step, written.name) == (3, "step-00000003")
    assert 0 < written.seconds < 60
    assert writer.wait() is None
    place = checkpoint.latest(tmp_path, str)
    assert checkpoint.load_state(place)["moments"].tolist() == [1] * 5
    sharded.read_model(place, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_is_written_at_a_time_and_each_is_told_of_once(tmp_path, model):
    writer = Writer(tmp_path, 5, Ranks(), is_sharded=False)
    told = [writer.save(step, model, {}, {"step": step}, None, 0.0) for step in (1, 2, 3)]
    told += [writer.wait(), writer.wait(), writer.done()]
    assert [written and written.step for written in told] == [None, 1, 2, 3, None, None]
    assert [checkpoint.load_state(d)["step"] for d in sorted(tmp_path.iterdir())] == [1, 2, 3]


@pytest.mark.parametrize("ask", [Writer.wait, lambda writer: writer.save(2, None, {}, {}, None, 0.0)])
def test_what_could_not_be_written_is_told_to_who_asks_next(tmp_path, model, monkeypatch, ask):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    writer = Writer(tmp_path, 1, Ranks(), is_sharded=False)
    writer.save(1, model, {}, {}, None, 0.0)
    with pytest.raises(TrainingError, match=r"step-00000001 cannot be written to .*: Input/output error"):
        ask(writer)
