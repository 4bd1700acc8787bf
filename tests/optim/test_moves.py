"""Moments in the CPU's memory: the same steps as on the GPU, in `step` and beside the backward pass."""

import warnings

import pytest
import torch
from stepping import matrices, parameters, same, saved_and_loaded, stepped
from torch import nn

from adafrugal.optim import Frugal, UpdateInBackward

LARGE = [(40, 300), (64, 64), (30, 520)]


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("fused", [False, True])
def test_moments_in_the_cpus_memory_make_the_same_steps(state_dtype, fused):
    ends = []
    for state_on in ("device", "cpu_always_full"):
        params, others = matrices(LARGE, device="cuda"), matrices([(80, 90), (7, 3)], device="cuda")
        groups = [{"params": params, "split": True}, {"params": others, "split": False}]
        settings = {"state_dtype": state_dtype, "stochastic_rounding": True, "fused": fused, "compile": False}
        optimizer = stepped(Frugal(groups, state_on=state_on, interval=3, density=0.5, **settings), range(7))
        moments = [optimizer.state[p][name] for p in others for name in ("exp_avg", "exp_avg_sq")]
        assert {moment.is_pinned() for moment in moments} == {state_on != "device"}
        assert {optimizer.state[p]["exp_avg"].device.type for p in params} == {"cuda"}
        copies = [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in groups]
        again = Frugal(copies)
        with pytest.warns(UserWarning, match="the saved state replaces settings"):
            again.load_state_dict(saved_and_loaded(optimizer))
        assert again.param_groups[1]["state_on"] == "device", "where moments lie is not taken from a saved state"
        ends += [parameters(stepped(each, range(7, 12))) for each in (optimizer, again)]
    for end in ends[1:]:
        for one, other in zip(ends[0], end, strict=True):  # fused: a kernel's last digits, by which a code may differ
            torch.testing.assert_close(one, other, rtol=0, atol=2e-3 if fused else 0)


def test_where_moments_lie_is_not_taken_from_a_saved_state():
    made = [named_on(state_on) for state_on in ("device", "cpu_always_full")]
    stepped(made[0], range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made[1].load_state_dict(saved_and_loaded(made[0]))
    assert [group["state_on"] for group in made[1].param_groups] == ["cpu_always_full"] * 2


def named_on(state_on):
    return Frugal([{"params": matrices(LARGE), "split": True}, {"params": matrices([(8, 9)])}], state_on=state_on)


def test_on_a_cpu_it_changes_nothing():
    ends = []
    for state_on in ("device", "cpu_always_full"):
        groups = [{"params": matrices(LARGE), "split": True}, {"params": matrices([(80, 90)])}]
        ends.append(parameters(stepped(Frugal(groups, state_on=state_on, interval=3, density=0.5), range(7))))
    assert same(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_beside_the_backward_pass_the_steps_are_the_same(state_dtype):
    """Large tensors, so that the copies are under way while the rest of the pass runs."""
    ends = []
    for state_on in ("device", "cpu_always_full"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(5)), nn.Linear(2048, 8192)).cuda()
        split = [layer.weight for layer in model[1:5]]
        others = [p for p in model.parameters() if all(p is not other for other in split)]
        groups = [{"params": split, "split": True}, {"params": others, "split": False}]
        settings = {"state_on": state_on, "state_dtype": state_dtype, "interval": 3, "density": 0.5, "fused": False}
        optimizer = Frugal(groups, lr=1e-3, **settings)
        UpdateInBackward(optimizer)
        for step in range(6):
            x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(step)).cuda()
            model(x).square().mean().backward()
            optimizer.step()
        moments = [optimizer.state[p]["exp_avg"].cpu().clone() for p in others]  # read at once, without a wait
        ends.append([*model.parameters(), *moments])
    assert same(*ends)
