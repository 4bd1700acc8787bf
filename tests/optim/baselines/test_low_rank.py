"""What APOLLO and Fira share, in every state of theirs."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from stepping import matrices, parameters, same, saved_and_loaded, stepped

from adafrugal.optim import UpdateInBackward, state_bytes
from adafrugal.optim.baselines.apollo import Apollo
from adafrugal.optim.baselines.fira import Fira
from adafrugal.optim.baselines.low_rank import limited, rank_of
from adafrugal.optim.baselines.scale import Scale

SHAPES = [(6, 10), (10, 6), (5, 5), (1, 7), (8, 1)]
BOTH = pytest.mark.parametrize("kind", [Apollo, Fira])


def made(kind, params=None, **options):
    return kind(params or matrices(SHAPES), **{"lr": 0.1, "rank": 2, "interval": 3, **options})


@BOTH
def test_copies_and_round_trips_continue_bit_for_bit(kind):
    """Saved at each step, before and after a new basis."""
    for at in (1, 2, 3, 4):
        optimizer = stepped(made(kind), range(at))
        twin, again = copy.deepcopy(optimizer), made(kind, copy.deepcopy(parameters(optimizer)), lr=9.0)
        again.load_state_dict(saved_and_loaded(optimizer))
        ends = [parameters(stepped(each, range(at, 7))) for each in (optimizer, twin, again)]
        assert same(ends[0], ends[1])
        assert same(ends[0], ends[2])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_of_another_dtype_survives_loading(kind, dtype):
    optimizer = stepped(made(kind, matrices(SHAPES, dtype)), range(4))
    again = made(kind, copy.deepcopy(parameters(optimizer)))
    again.load_state_dict(saved_and_loaded(optimizer))
    assert same(parameters(stepped(optimizer, range(4, 7))), parameters(stepped(again, range(4, 7))))


@BOTH
def test_random_numbers_are_those_of_the_seed_the_matrix_and_the_period(kind):
    """Two equal matrices with equal gradients part, if bases are random; the global generator is not used."""
    def run(seed, global_seed):
        torch.manual_seed(global_seed)
        one, other = torch.nn.Parameter(torch.zeros(8, 8)), torch.nn.Parameter(torch.zeros(8, 8))
        optimizer = made(kind, [one, other], seed=seed)
        for step in range(4):
            grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            one.grad, other.grad = grad.clone(), grad.clone()
            optimizer.step()
        return one, other

    assert same(run(0, 1), run(0, 2))
    is_random = kind is Apollo
    one, other = run(0, 1)
    assert torch.equal(one, other) is not is_random
    assert torch.equal(one, run(1, 1)[0]) is not is_random


@BOTH
def test_update_in_backward_gives_the_same(kind):
    params = matrices(SHAPES)
    optimizer, plain = made(kind, params), made(kind, copy.deepcopy(params))
    UpdateInBackward(optimizer)
    for step in range(5):
        generator = torch.Generator().manual_seed(1000 + step)
        sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params).backward()
        optimizer.step()
    assert same(params, parameters(stepped(plain, range(5))))


@BOTH
def test_gradients_of_zeros_move_nothing_and_leave_no_limit(kind):
    optimizer = made(kind, matrices(SHAPES))
    before = [param.detach().clone() for param in parameters(optimizer)]
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same(parameters(optimizer), before)
    stepped(optimizer, [0])
    moved = [(now - old).norm() for now, old in zip(parameters(optimizer), before, strict=True)]
    assert min(moved) > 1e-3


@BOTH
def test_only_matrices_with_a_gradient_are_updated(kind):
    first, second = matrices([(4, 6), (6, 4)])
    optimizer, before = made(kind, [first, second]), second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before)
    assert not optimizer.state[second]
    with pytest.raises(ValueError, match=rf"{kind.__name__} is given a tensor of shape \[4\]; allowed: matrices"):
        made(kind, matrices([(4,)]))


@BOTH
@pytest.mark.parametrize(("option", "value"), [
    ("rank", 0), ("rank", -1), ("rank", 1.7), ("rank", True), ("rank", "two"), ("rank", math.nan), ("interval", 0),
    ("interval", 2.5), ("growth", 0.5), ("growth", math.inf), ("betas", (1.5, 0.9)), ("betas", 0.9), ("lr", -1),
    ("eps", -1e-8), ("weight_decay", -1), ("scaling", "row"), ("alpha", 0),
])  # fmt: skip
def test_an_option_out_of_its_range_is_refused_wherever_it_is_given(kind, option, value):
    optimizer, (new,) = made(kind), matrices([(3, 4)])
    if option not in optimizer.defaults:
        with pytest.raises(TypeError, match=option):
            made(kind, **{option: value})
        return
    says = re.escape(f"{option} is {value!r}; allowed: ")
    with pytest.raises(ValueError, match=says):
        made(kind, **{option: value})
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({"params": [new], option: value})
    assert len(optimizer.param_groups) == 1


@BOTH
def test_a_misspelt_option_is_refused_and_numbers_become_plain(kind):
    with pytest.raises(TypeError, match="'ranks'"):
        made(kind, ranks=3)
    with pytest.raises(ValueError, match="a group has the key 'ranks'; did you mean 'rank'"):
        kind([{"params": matrices(SHAPES), "ranks": 3}])
    given = {"params": matrices(SHAPES), "rank": np.int64(2), "schedule": "mine"}
    (group,) = kind([given], lr=np.float32(0.5)).param_groups
    assert (type(group["rank"]), type(group["lr"]), group["schedule"]) == (int, float, "mine")


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_weights_in_which_epsilon_is_0_or_that_are_complex_are_refused(kind, dtype):
    with pytest.raises(ValueError, match=f"{kind.__name__} is given a tensor in {str(dtype)[6:]}; allowed: float32, "):
        made(kind, [torch.nn.Parameter(torch.zeros(3, 4, dtype=dtype))])


@BOTH
def test_a_sparse_gradient_is_refused_before_anything_moves_and_an_empty_matrix_left_out(kind):
    first, empty, last = params = matrices([(4, 6), (0, 6), (6, 4)])
    optimizer, before = made(kind, params), [param.detach().clone() for param in params]
    first.grad, empty.grad, last.grad = torch.ones(4, 6), torch.ones(0, 6), torch.ones(6, 4).to_sparse()
    with pytest.raises(ValueError, match=f"{kind.__name__} takes no sparse gradients"):
        optimizer.step()
    assert same(params, before)
    last.grad = torch.ones(6, 4)
    optimizer.step()
    assert not torch.equal(first, before[0]) and not torch.equal(last, before[2])
    assert set(optimizer.state) == {first, last}
    again = made(kind, copy.deepcopy(params))
    again.load_state_dict(saved_and_loaded(optimizer))
    assert len(again.state) == 2


@pytest.mark.parametrize(("ours", "theirs", "lacks"), [
    (Apollo, Fira, "scaling"), (Fira, Apollo, "alpha"), (Scale, Fira, "momentum, dim"), (Fira, Scale, "betas, eps"),
    (Apollo, torch.optim.AdamW, "rank, interval"),
])  # fmt: skip
def test_a_state_of_another_optimizer_is_refused_and_nothing_changed(ours, theirs, lacks):
    saved = stepped(theirs(matrices(SHAPES)), range(2)).state_dict()
    optimizer = stepped(ours(matrices(SHAPES), lr=0.1), range(2))
    twin = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=f"of another optimizer than {ours.__name__}: its groups have no {lacks}"):
        optimizer.load_state_dict(saved)
    assert same(parameters(stepped(optimizer, range(2, 4))), parameters(stepped(twin, range(2, 4))))


@BOTH
def test_a_state_that_does_not_go_with_its_rank_is_refused_before_anything_moves(kind):
    optimizer = stepped(made(kind), range(2))
    twin, before = copy.deepcopy(optimizer), [param.detach().clone() for param in parameters(optimizer)]
    says = rf"matrix \[6, 10\] has exp_avg of shape \[2, 10\], and {kind.__name__} .* needs \[3, 10\]"
    optimizer.param_groups[0]["rank"] = 3
    with pytest.raises(ValueError, match=says):
        stepped(optimizer, [2])
    assert same(parameters(optimizer), before)
    with pytest.raises(ValueError, match=says):
        twin.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["rank"] = 2
    assert same(parameters(stepped(optimizer, [2])), parameters(stepped(twin, [2])))
    lacking = saved_and_loaded(twin)
    del lacking["state"][1]["norm"]
    with pytest.raises(ValueError, match=r"matrix \[10, 6\] has no norm"):
        twin.load_state_dict(lacking)


@BOTH
def test_a_state_is_checked_as_hooks_give_it(kind):
    optimizer = stepped(made(kind), range(2))
    saved = saved_and_loaded(optimizer)
    saved["param_groups"][0]["r"] = saved["param_groups"][0].pop("rank")

    def rename(_, state):
        state["param_groups"][0]["rank"] = state["param_groups"][0].pop("r")

    again = made(kind, copy.deepcopy(parameters(optimizer)), rank=4)
    handle = again.register_load_state_dict_pre_hook(rename)
    again.load_state_dict(saved)
    handle.remove()
    again.load_state_dict(again.state_dict())
    assert same(parameters(stepped(optimizer, [2])), parameters(stepped(again, [2])))


@BOTH
def test_decay_is_that_of_adamw(kind):
    """`W(1 − η·λ)`, whatever the update is."""
    decayed, plain = (stepped(made(kind, weight_decay=decay), [0]) for decay in (0.5, 0.0))
    for given, shrunk, other in zip(matrices(SHAPES), parameters(decayed), parameters(plain), strict=True):
        torch.testing.assert_close(other - shrunk, 0.1 * 0.5 * given)


def test_bytes_of_state():
    """For R of a matrix n × d two moments n × r; Fira's basis has d × r; a norm and a count for each matrix."""
    sizes = {kind: state_bytes(stepped(made(kind, matrices([(6, 10)])), range(2))) for kind in (Apollo, Fira)}
    assert sizes[Apollo] == {"0": {"moments": 4 * (2 * 2 * 10 + 1), "counters": 4}}
    assert sizes[Fira] == {"0": {"basis": 4 * 2 * 6, "moments": 4 * (2 * 2 * 10 + 1), "counters": 4}}


def test_a_rank_is_a_number_of_directions_or_a_share():
    shape = torch.Size([40, 12])
    assert [rank_of(shape, rank) for rank in (1, 5, 99, 0.25, 0.001, 1.0)] == [1, 5, 12, 3, 1, 1]


def test_a_norm_grows_at_most_by_its_limit():
    given = torch.full((2, 2), 3.0)  # of norm 6
    cases = {None: 6, 6.0: 6, 5.0: 5 * 1.01, 1.0: 1.01, 0.0: 6, 100.0: 6}
    for last, expected in cases.items():
        found, norm = limited(given, None if last is None else torch.tensor(last), 1.01)
        assert norm.item() == pytest.approx(expected)
        assert found.norm().item() == pytest.approx(expected)
    assert math.isnan(limited(given * math.nan, torch.tensor(1.0), 1.01)[1])
