"""Several optimizers as one, against each of them alone."""

import copy

import pytest
import torch
from stepping import matrices, parameters, same, saved_and_loaded, stepped
from torch import nn

from adafrugal.optim import Several, state_bytes


def joined(params=None, lr=0.1):
    matrix, vector = params or matrices([(4, 4), (4,)])
    return Several(torch.optim.Muon([("w", matrix)], lr=lr), torch.optim.AdamW([("b", vector)], lr=2 * lr))


def test_each_part_updates_its_own_as_it_would_alone():
    several, (matrix, vector) = stepped(joined(), range(5)), matrices([(4, 4), (4,)])
    for part in (torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.2)):
        stepped(part, range(5), [matrix, vector])
    assert same(parameters(several), [matrix, vector])


def test_schedulers_move_all_rates_also_after_loading():
    several = stepped(joined(), range(2))
    several.load_state_dict(several.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(several, lambda step: 0.5**step)
    stepped(several, [2])
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in several.parts] == [0.05, 0.1]


def test_copies_and_round_trips_continue_bit_for_bit():
    several = stepped(joined(), range(3))
    twin, again = copy.deepcopy(several), joined(copy.deepcopy(parameters(several)), lr=9.0)
    again.load_state_dict(saved_and_loaded(several))
    ends = [parameters(stepped(each, range(3, 6))) for each in (several, twin, again)]
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_a_state_that_does_not_fit_changes_nothing():
    several = stepped(joined(), range(2))
    other = several.state_dict()
    other["parts"][0]["param_groups"][0]["lr"] = 7.0
    other["parts"][1] = torch.optim.AdamW([nn.Parameter(torch.ones(2)) for _ in range(2)]).state_dict()
    for state, says in (
        (other, r"groups of \[2\] tensors, ours have \[1\]"),
        (several.parts[0].state_dict(), "of 0 optimizers, not of 2"),
    ):
        with pytest.raises(ValueError, match=says):
            several.load_state_dict(state)
    assert several.param_groups[0]["lr"] == 0.1


def test_bytes_are_counted_over_all_parts():
    assert state_bytes(stepped(joined(), [0])) == {"w": {"moments": 64}, "b": {"moments": 32, "counters": 4}}


def test_a_closure_is_called_once_and_a_parameter_belongs_to_one():
    several, calls = joined(), []
    assert several.step(lambda: calls.append(1) or 3.0) == 3.0
    assert calls == [1]
    with pytest.raises(ValueError, match="in more than one"):
        Several(several.parts[0], torch.optim.AdamW(parameters(several)))
    with pytest.raises(ValueError, match="one of the parts"):
        several.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
