"""What the caller has set in torch is no part of what a step computes."""

import contextlib

import pytest
import torch
from stepping import frugal, matrices, parameters, same, stepped

from adafrugal.optim import LinearDecay, UpdateInBackward
from adafrugal.optim.subspaces import SUBSPACES


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


MODES = {
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}
KINDS = [*SUBSPACES, {"kind": "svd", "svd_method": "subspace_iteration"}, {"kind": "blocks", "order": "random"}]


@pytest.mark.parametrize("on_refresh", ["reset", "other"])
@pytest.mark.parametrize("subspace", KINDS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_steps_are_the_same_in_every_mode(mode, subspace, on_refresh):
    policy = {"blocks": "keep_overlap", "svd": "keep", "random": "keep"}
    kind = subspace["kind"] if isinstance(subspace, dict) else subspace
    policy = "reset" if on_refresh == "reset" else policy.get(kind, "keep_overlap")
    how = {"subspace": subspace, "on_refresh": policy}
    how |= {"density": LinearDecay(0.8, 0.3, steps=8), "interval": 3, "state_free": "sgd", "lr": 0.01}
    plain, other = (frugal(matrices(), **how) for _ in range(2))
    for step in range(8):
        stepped(plain, [step])
        for one, copy in zip(parameters(plain), parameters(other), strict=True):
            copy.grad = one.grad.clone()
        with MODES[mode]() if step % 4 != 3 else contextlib.nullcontext():
            other.step()
    assert same(parameters(plain), parameters(other))
    assert plain.checksum() == other.checksum()
    for one, copy in zip(parameters(plain), parameters(other), strict=True):
        for name, value in plain.state[one].items():
            if torch.is_tensor(value):
                assert not other.state[copy][name].is_inference()
                torch.testing.assert_close(other.state[copy][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_is_the_same_in_whichever_mode_it_is_loaded(mode):
    optimizer = stepped(frugal(matrices(), subspace="columns", density=0.5), range(2))
    copies = [torch.nn.Parameter(param.detach().clone()) for param in parameters(optimizer)]
    again = frugal(copies, subspace="columns", density=0.5)
    with MODES[mode]():
        again.load_state_dict(optimizer.state_dict())
    assert same(*(parameters(stepped(each, range(2, 4))) for each in (optimizer, again)))


def test_autocast_is_no_part_of_updates_in_the_backward_pass():
    ends = []
    for mode in (contextlib.nullcontext, MODES["autocast"]):
        (param,) = matrices([(12, 8)])
        optimizer = frugal([param], subspace="svd", density=0.5, state_free="sgd")
        UpdateInBackward(optimizer)
        for factor in (1.0, 2.0):
            loss = factor * (param**3).sum()
            with mode():
                loss.backward()
                optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_a_closure_runs_in_the_modes_of_its_caller():
    (param,) = matrices([(12, 8)])
    found = []

    def closure():
        found.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return 1.0

    with MODES["autocast"]():
        assert frugal([param], density=1.0).step(closure) == 1.0
    assert found == [(True, True)]
