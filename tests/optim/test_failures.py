"""A step that fails: what it leaves, and what the next one makes of it."""

import itertools

import pytest
import torch
from stepping import events_of, frugal, matrices, parameters, same, saved_and_loaded, stepped

from adafrugal.optim import Frugal, LinearDecay, UpdateInBackward, refresh, updates


def fuse(function, at, error=KeyboardInterrupt):
    """A function that fails at its call number `at`, counted from 1."""
    calls = itertools.count(1)

    def fail_once(*given, **options):
        if next(calls) == at:
            raise error
        return function(*given, **options)

    return fail_once


def clocks_of(optimizer):
    return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in optimizer.param_groups]


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.linalg.LinAlgError, torch.OutOfMemoryError, ValueError])
def test_a_refresh_that_fails_is_made_at_the_next_step_and_gradients_are_looked_at(error, monkeypatch):
    optimizer = stepped(frugal(matrices(), subspace="svd", density=0.5, interval=3, nonfinite="skip"), range(3))
    weights = [param.detach().clone() for param in parameters(optimizer)]
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(torch.linalg, "svd", fuse(torch.linalg.svd, 3, error))
        stepped(optimizer, [3])
    assert optimizer.param_groups[0]["steps"] == 3
    assert same(parameters(optimizer), weights)
    parameters(optimizer)[0].grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(parameters(optimizer), weights)
    events = events_of(optimizer)
    stepped(optimizer, [3])
    assert events == [("refresh", 4)]


def places_of_failure():
    """Functions through which a step goes before its updates, in the order in which it does."""
    return [
        (Frugal, "_split_groups"), (refresh, "advance"), (refresh, "forget_all"), (refresh, "_let_go"),
        (refresh.owners, "select"), (refresh, "_keep"), (refresh, "_keep_overlap"), (refresh, "shrink"),
        (updates, "begin_moments"),
    ]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), places_of_failure(), ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("on_refresh", ["reset", "reset_all", "keep", "keep_overlap"])
def test_a_step_that_fails_before_its_updates_is_made_by_the_next(on_refresh, owner, name, monkeypatch):
    """At each call of each of these functions, as if it had not failed; also from a state that was saved in between."""
    how = {"density": LinearDecay(0.9, 0.3, steps=10), "interval": 3, "on_refresh": on_refresh, "lr": 0.01}
    kinds = {"reset": "slab", "keep": "slab"}.get(on_refresh, "columns")

    def groups(seed):
        params = matrices(seed=seed)
        whole, staggered = {"params": params[:4]}, {"params": params[4:6], "stagger": 2}
        return [*({**group, "split": True, "subspace": kinds} for group in (whole, staggered)), {"params": params[6:]}]

    plain, failing = (Frugal(groups(0), **how) for _ in range(2))
    events, others = events_of(plain), events_of(failing)
    raised = 0
    for step in range(7):
        for at in (1, 2, 6):
            clocks, weights = clocks_of(failing), [param.detach().clone() for param in parameters(failing)]
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fuse(getattr(owner, name), at))
                try:
                    stepped(failing, [step])
                    break
                except KeyboardInterrupt:
                    raised += 1
            assert [group["steps"] for group in failing.param_groups] == [group["steps"] for group in clocks]
            assert same(parameters(failing), weights)
            Frugal(groups(1), **how).load_state_dict(saved_and_loaded(failing))
        else:
            stepped(failing, [step])
        stepped(plain, [step])
        if on_refresh.startswith("reset") or name not in ("_keep", "_keep_overlap", "shrink", "_let_go"):
            assert same(parameters(plain), parameters(failing)), step
            assert plain.checksum() == failing.checksum()
            assert plain.state_bytes() == failing.state_bytes()
    assert events == others
    assert raised or (name, on_refresh) in unused()


def unused():
    """Functions that a policy does not call."""
    keeps = [("_keep", policy) for policy in ("reset", "reset_all", "keep_overlap")]
    keeps += [("_keep_overlap", policy) for policy in ("reset", "reset_all", "keep")]
    return [*keeps, *(("forget_all", policy) for policy in ("reset", "keep", "keep_overlap"))]


def failed_amid_updates(monkeypatch):
    groups = [{"params": matrices(), "split": True}, {"params": [torch.nn.Parameter(torch.ones(3))]}]
    optimizer = stepped(Frugal(groups), range(2))
    saved = saved_and_loaded(optimizer)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(updates, "update", fuse(updates.update, 2))
        stepped(optimizer, [2])
    return optimizer, saved


def test_a_step_that_fails_amid_its_updates_is_the_last_until_a_state_is_loaded(monkeypatch):
    optimizer, saved = failed_amid_updates(monkeypatch)
    weights = [param.detach().clone() for param in parameters(optimizer)]
    with pytest.raises(RuntimeError, match=r"step 3 failed amid its updates \(KeyboardInterrupt\).*load a saved state"):
        stepped(optimizer, [2])
    assert same(parameters(optimizer), weights)
    with pytest.warns(UserWarning, match="step 3 failed amid its updates.*a state saved now is half of this step's"):
        optimizer.state_dict()
    optimizer.load_state_dict(saved)
    stepped(optimizer, [2])
    assert optimizer.param_groups[0]["steps"] == 3


def test_in_the_backward_pass_too(monkeypatch):
    first, second = matrices([(6, 8), (6, 8)])
    optimizer = frugal([first, second], subspace="svd", density=0.5)
    UpdateInBackward(optimizer)

    def backward():
        (first.sum() ** 2).backward()
        (second.sum() ** 2).backward()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.linalg, "svd", fuse(torch.linalg.svd, 1))
        backward()
    assert optimizer.param_groups[0]["steps"] == 0, "nothing had moved yet"
    first.grad = None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.linalg, "svd", fuse(torch.linalg.svd, 2))
        backward()
    second.grad = None
    with pytest.raises(RuntimeError, match="step 1 failed amid its updates"):
        optimizer.step()
