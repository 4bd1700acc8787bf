"""State-free rules as objects: names, mappings, what each is given, what is saved and what is refused."""

import copy
import inspect
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from own_parts import RULES, ColumnNorm, Cube, MatrixNorm, RowNorm
from stepping import frugal, matrices, parameters, same, saved_and_loaded, stepped

from adafrugal.optim import Frugal, StateFree, choices
from adafrugal.optim.state_free import STATE_FREE, NoUpdate, SignSGD, Whiten, state_free

SEEN = [RowNorm(), ColumnNorm(), MatrixNorm()]  # each more than an entry
ids = {"ids": lambda rule: getattr(rule, "kind", None)}


@pytest.mark.parametrize("value", ["signsgd", {"kind": "signsgd"}, SignSGD()])
def test_a_rule_is_a_name_a_mapping_or_an_object(value):
    assert state_free(value) == SignSGD()
    assert state_free(state_free(value).settings()) == state_free(value)


def test_names_settings_and_what_is_seen_are_those_of_the_classes():
    assert inspect.signature(Frugal).parameters["state_free"].default == next(iter(choices.STATE_FREE))
    assert {kind: rule.sees for kind, rule in STATE_FREE.items()} == choices.SEEN_BY
    assert {kind: rule().settings() for kind, rule in STATE_FREE.items()} == {
        kind: {"kind": kind} | {name: values[0] for name, values in settings.items()}
        for kind, settings in choices.STATE_FREE.items()
    }


@pytest.mark.parametrize("rule", [*(rule() for rule in STATE_FREE.values()), *RULES], **ids)
def test_what_a_rule_sees_is_what_its_direction_depends_on(rule):
    """A row, a column or an entry alone has the direction that it has within a matrix; the gradient stays as it was."""
    grad = torch.randn(6, 5, dtype=torch.float64)
    before, found = grad.clone(), rule(grad)
    some, every = slice(1, 3), slice(None)
    part = {"nothing": (some, some), "entries": (some, some), "rows": (some, every), "columns": (every, some)}
    part = part.get(rule.sees, (every, every))
    torch.testing.assert_close(rule(grad[part]), found[part])
    assert torch.equal(grad, before)
    assert found.shape == grad.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", SEEN, **ids)
def test_a_matrix_of_which_slices_are_copied_is_seen_as_a_whole(rule, dtype, monkeypatch):
    """The first step of bfloat16 weights larger than a slice, or of bfloat16 moments, is that of float32."""
    monkeypatch.setattr("adafrugal.optim.updates._IN_A_SLICE", 40)
    (plain,), (narrow,) = matrices([(12, 9)], torch.bfloat16), matrices([(12, 9)], torch.bfloat16)
    plain.data, narrow.data = plain.data.float(), narrow.data.to(dtype)
    how = {"density": 0.0, "state_free": rule, "lr": 0.1}
    for param, more in ((plain, {}), (narrow, {"state_dtype": "bfloat16", "stochastic_rounding": True})):
        param.grad = matrices([(12, 9)], torch.bfloat16, seed=1)[0].data.to(param.dtype)
        frugal([param], **how, **more).step()
    torch.testing.assert_close(narrow.float(), plain, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("rule", RULES, **ids)
def test_large_groups_are_updated_as_small_ones_are(rule):
    """By the compiled forms where there is one."""
    ends = [
        parameters(stepped(frugal(matrices(), state_free=rule, subspace=kind, compile=to_compile), range(4)))
        for kind in ("blocks", "columns", "slab")
        for to_compile in (False, True)
    ]
    for plain, compiled in zip(ends[::2], ends[1::2], strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("subspace", ["blocks", "slab"])
def test_one_direction_is_made_at_a_time(subspace, monkeypatch):
    """Not one for each matrix of a group, which would need the memory of all gradients once more."""
    alive, most = [], []

    def direction(self, grad):
        found = grad.clone()
        alive.append(torch.utils.weak.WeakTensorKeyDictionary({found: None}))
        most.append(sum(map(len, alive)))
        return found

    monkeypatch.setattr(MatrixNorm, "direction", direction)
    stepped(frugal(matrices(), state_free=MatrixNorm(), subspace=subspace, density=0.4), range(2))
    assert len(most) > 8
    assert max(most) == 1


@pytest.fixture
def stacks(monkeypatch):
    """As on a GPU: the shapes that rules are given, of matrices of which three are a batch."""
    given = []
    monkeypatch.setattr("adafrugal.optim.updates._costs_a_launch", lambda target: True)
    monkeypatch.setattr("adafrugal.optim.updates._IN_A_BATCH", 3 * 60 + 1)
    call = StateFree.__call__

    def recorded(rule, grad):
        if not rule.by_entry:  # else it adds a direction that is made
            given.append(tuple(grad.shape))
        return call(rule, grad)

    monkeypatch.setattr(StateFree, "__call__", recorded)
    return given


@pytest.mark.parametrize("rule", [rule() for rule in STATE_FREE.values() if rule.takes_stacks], **ids)
@pytest.mark.parametrize("subspace", ["blocks", "columns", "slab", "randk", "svd"])
def test_matrices_of_a_shape_are_given_in_stacks_and_updated_as_alone(rule, subspace, stacks):
    how = {"state_free": rule, "subspace": subspace, "density": 0.25, "weight_decay": 0.1, "lr": 0.1}
    how |= {"maximize": True, "interval": 2}
    ends, shapes = [], [(6, 10), (10, 6)] * 4
    for fused in (False, True):
        stacks.clear()
        optimizer = stepped(frugal(matrices(shapes), fused=fused, compile=False, **how), range(5))
        ends.append([*parameters(optimizer), *(optimizer.state[p]["exp_avg"] for p in parameters(optimizer))])
    torch.testing.assert_close(*ends)
    assert max(map(math.prod, stacks)) == 3 * 60
    assert sum(map(math.prod, stacks)) == 5 * 60 * (6 if subspace == "blocks" else 8)
    if subspace != "blocks":
        assert Counter(stacks) == dict.fromkeys([(3, 6, 10), (6, 10), (3, 10, 6), (10, 6)], 5)


def test_only_rules_that_say_so_are_given_stacks(stacks):
    stepped(frugal(matrices([(6, 10)] * 4), state_free=MatrixNorm(), density=0.25), [0])
    assert stacks == [(6, 10)] * 3


@pytest.mark.parametrize("rule", [SignSGD(), MatrixNorm(eps=1e-3)], **ids)
def test_a_saved_rule_is_loaded_with_its_settings(rule):
    optimizer = stepped(frugal(matrices(), state_free=rule, interval=3), range(5))
    saved = saved_and_loaded(optimizer)
    assert saved["param_groups"][0]["state_free"] in ("signsgd", {"kind": "own_norm", "eps": 1e-3})
    other = frugal(matrices(seed=1), state_free=type(rule)(), interval=3)
    with torch.no_grad():
        for ours, theirs in zip(parameters(other), parameters(optimizer), strict=True):
            ours.copy_(theirs)
    with pytest.warns(UserWarning, match="state_free.eps 0.001") if len(rule.settings()) > 1 else nullcontext():
        other.load_state_dict(saved)
    assert other.param_groups[0]["state_free"] == rule
    assert same(parameters(stepped(other, range(5, 9))), parameters(stepped(optimizer, range(5, 9))))


def test_a_rule_may_be_replaced_between_two_steps():
    optimizer = stepped(frugal(matrices(), density=0.0), range(2))
    optimizer.param_groups[0]["state_free"] = "none"
    before = [param.detach().clone() for param in parameters(optimizer)]
    assert same(parameters(stepped(optimizer, range(2, 3))), before)
    assert optimizer.param_groups[0]["state_free"] == NoUpdate()


@pytest.mark.parametrize("rule", ["whiten", Whiten()], ids=type)
def test_a_rule_that_cannot_be_is_refused_however_often_it_is_tried(rule):
    shape = [torch.nn.Parameter(torch.ones(4, 3, 3))]
    optimizer = frugal(shape, density=0.0)
    for _ in range(2):  # before the first step, and after it
        optimizer.param_groups[0]["state_free"], before = rule, shape[0].detach().clone()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"has shape \(4, 3, 3\), and the state-free rule whiten sees"):
                stepped(optimizer, [0])
        assert torch.equal(shape[0], before)
        optimizer.param_groups[0]["state_free"] = "signsgd"
        stepped(optimizer, [0])
    assert optimizer.param_groups[0]["steps"] == 2
    copied = copy.deepcopy(optimizer)
    copied.param_groups[0]["state_free"] = rule
    for use in (stepped, lambda copied, _: copy.deepcopy(copied)):
        with pytest.raises(ValueError, match="sees a whole matrix"):
            use(copied, [0])


@pytest.mark.parametrize("given", [{"density": 0.5}, {"interval": 5}, {"state_free": "whiten"}], ids=str)
def test_a_copy_has_what_was_assigned_since_the_last_step(given):
    optimizer = stepped(frugal(matrices([(8, 16)] * 4), density=0.25, interval=2), [0])
    optimizer.param_groups[0] |= given
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, copied):
        stepped(each, [1, 2])
    assert same(parameters(optimizer), parameters(copied))


def test_a_copy_takes_no_other_subspace():
    optimizer = frugal(matrices([(8, 16)] * 4), density=0.25)
    optimizer.param_groups[0]["subspace"] = "columns"
    with pytest.raises(ValueError, match="the subspace cannot be changed to 'columns'"):
        copy.deepcopy(optimizer)


def test_swan_warns_of_a_matrix_that_it_does_not_train():
    params = [("time.weight", torch.nn.Parameter(torch.ones(4, 1)))]
    with pytest.warns(UserWarning, match=r"time.weight has shape \(4, 1\), and swan trains no matrix"):
        optimizer = frugal(params, state_free="swan", density=0.0)
    assert torch.equal(params[0][1], torch.ones(4, 1)) and stepped(optimizer, [0])
    assert torch.equal(params[0][1], torch.ones(4, 1))
    frugal(params, state_free="whiten", subspace="rows")


@dataclass(frozen=True)
class OtherSigns(StateFree):
    kind: ClassVar[str] = "signsgd"

    def direction(self, grad):
        return -grad.sign()


class Flat(Cube):
    kind: ClassVar[str] = "flat"

    def direction(self, grad):
        return grad.flatten()


class Guess(Cube):
    sees: ClassVar[str] = "everything"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("sign", "state_free is 'sign'; allowed: signsgd, sgd, none, whiten"),
        (None, "state_free is None; allowed: signsgd, sgd, none, whiten"),
        *(({"kind": "swan", "steps": n}, f"steps is {n}; allowed: whole numbers, 1 to 10") for n in (0, True, 5.0)),
        ({"kind": "sgd", "power": 2}, "state_free 'sgd' has no 'power'; it has no settings"),
        (OtherSigns(), "OtherSigns has the kind 'signsgd' of SignSGD.* give it a kind of its own"),
    ],
)
def test_an_impossible_rule_is_refused_when_the_optimizer_is_made(value, says):
    with pytest.raises(ValueError, match=says):
        frugal(matrices(), state_free=value)


def test_a_class_that_is_no_rule_is_refused_when_it_is_used():
    with pytest.raises(ValueError, match="sees is 'everything'; allowed: nothing, entries, rows, columns, matrix"):
        Guess()
    with pytest.raises(TypeError, match="direction"):
        StateFree()
    with pytest.raises(ValueError, match=r"direction of state-free rule flat has shape \[60\] for .* \[6, 10\]"):
        stepped(frugal(matrices(), state_free=Flat(), density=0.0), [0])


@pytest.mark.parametrize("rule", SEEN, **ids)
def test_vectors_are_refused_by_rules_that_see_lines(rule):
    norm = ("norm.weight", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=rf"parameter norm.weight has shape \(3,\), .*{rule.kind} sees .*whole"):
        frugal([norm], state_free=rule, density=0.0)
    stepped(frugal([norm], state_free="signsgd", density=0.0), [0])
