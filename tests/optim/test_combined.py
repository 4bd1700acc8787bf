import copy
import io

import pytest
import torch
from torch import nn

from adafrugal.optim import Several, state_bytes


def made():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    several = Several(torch.optim.Muon([("w", matrix)], lr=0.1), torch.optim.AdamW([("b", vector)], lr=0.2))
    return several, matrix, vector


def stepped(several, matrix, vector, steps):
    for step in steps:
        for p in (matrix, vector):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        several.step()


def test_each_part_updates_its_own_as_it_would_alone():
    several, matrix, vector = made()
    alone = copy.deepcopy(matrix), copy.deepcopy(vector)
    parts = torch.optim.Muon([alone[0]], lr=0.1), torch.optim.AdamW([alone[1]], lr=0.2)
    stepped(several, matrix, vector, range(5))
    for step in range(5):
        for p, part in zip(alone, parts, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            part.step()
    assert torch.equal(matrix, alone[0])
    assert torch.equal(vector, alone[1])


def test_schedulers_move_all_rates_also_after_loading():
    several, matrix, vector = made()
    stepped(several, matrix, vector, range(2))
    several.load_state_dict(several.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(several, lambda step: 0.5**step)
    stepped(several, matrix, vector, [2])
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in several.parts] == [0.05, 0.1]


def test_a_round_trip_continues_bit_for_bit():
    several, matrix, vector = made()
    stepped(several, matrix, vector, range(3))
    buffer = io.BytesIO()
    torch.save(several.state_dict(), buffer)
    buffer.seek(0)
    twins = copy.deepcopy(matrix), copy.deepcopy(vector)
    again = Several(torch.optim.Muon([twins[0]], lr=9.0), torch.optim.AdamW([twins[1]], lr=9.0))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    stepped(several, matrix, vector, range(3, 6))
    stepped(again, *twins, range(3, 6))
    assert torch.equal(matrix, twins[0])
    assert torch.equal(vector, twins[1])
    with pytest.raises(ValueError, match="of 0 optimizers, not of 2"):
        again.load_state_dict(again.parts[0].state_dict())


def test_copies_work_and_a_state_that_does_not_fit_changes_nothing():
    several, matrix, vector = made()
    stepped(several, matrix, vector, range(2))
    twin = copy.deepcopy(several)
    own = [p for group in twin.param_groups for p in group["params"]]
    stepped(several, matrix, vector, [2])
    stepped(twin, *own, [2])
    assert torch.equal(own[0], matrix)
    assert torch.equal(own[1], vector)
    other = several.state_dict()
    other["parts"][0]["param_groups"][0]["lr"] = 7.0
    other["parts"][1] = torch.optim.AdamW([vector, nn.Parameter(torch.ones(2))]).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[2\] tensors, ours have \[1\]"):
        several.load_state_dict(other)
    assert several.param_groups[0]["lr"] == 0.1


def test_bytes_are_counted_over_all_parts():
    several, matrix, vector = made()
    stepped(several, matrix, vector, range(1))
    assert state_bytes(several) == {"w": {"moments": 64}, "b": {"moments": 32, "counters": 4}}


def test_a_closure_is_called_once_and_a_parameter_belongs_to_one():
    several, matrix, _ = made()
    calls = []
    assert several.step(lambda: calls.append(1) or 3.0) == 3.0
    assert calls == [1]
    with pytest.raises(ValueError, match="in more than one"):
        Several(torch.optim.Muon([matrix]), torch.optim.AdamW([matrix]))
    with pytest.raises(ValueError, match="one of the parts"):
        several.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
