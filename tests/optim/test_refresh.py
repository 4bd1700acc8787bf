"""What a refresh does to moments, when matrices choose, and what is stored in fewer bits."""

import itertools
import warnings
import weakref
from functools import partial

import pytest
import stepping
import torch
from stepping import events_of, parameters, same, stepped
from torch import nn

from adafrugal.optim import Frugal, LinearDecay
from adafrugal.optim.choices import POLICIES
from adafrugal.optim.subspaces import SUBSPACES

frugal = partial(stepping.frugal, **{"density": 0.5, "interval": 4, "lr": 0.01})
EVERYWHERE = ["columns", "rows", "slab", "randk", "randperm", "svd", "random"]  # all but blocks


def matrices(n=6, shape=(12, 8), dtype=torch.float32):
    return stepping.matrices([shape] * n, dtype)


# -- when matrices choose ---------------------------------------------------------------------------------------------


def test_a_staggered_refresh_is_spread_evenly_over_its_steps():
    optimizer = frugal(matrices(), subspace="columns", interval=5, stagger=3)
    events, changed, last = events_of(optimizer), [], [None] * 6
    for step in range(11):
        stepped(optimizer, [step])
        now = [optimizer.state[p]["indices"].tolist() for p in parameters(optimizer)]
        changed.append([i for i in range(6) if now[i] != last[i]])
        last = now
    assert events == [("refresh", 1), ("refresh", 6), ("continued", 7), ("continued", 8), ("refresh", 11)]
    assert changed == [[*range(6)], [], [], [], [], [0, 1], [2, 3], [4, 5], [], [], [0, 1]]


def test_a_period_that_ends_before_it_is_spread_leaves_no_matrix_behind():
    optimizer = stepped(frugal(matrices(10), subspace="columns", interval=10, stagger=10), range(10))
    optimizer.param_groups[0]["interval"] = 3
    before = [optimizer.state[p]["indices"] for p in parameters(optimizer)]
    stepped(optimizer, range(10, 17))
    now = [optimizer.state[p]["indices"] for p in parameters(optimizer)]
    assert not any(map(torch.equal, before, now))


@pytest.mark.parametrize("subspace", EVERYWHERE)
def test_memory_follows_the_density_while_a_refresh_is_spread(subspace):
    optimizer = frugal(
        matrices(6, (20, 16)), subspace=subspace, density=LinearDecay(0.8, 0.2, 20), interval=7, stagger=5
    )
    for step in range(22):
        stepped(optimizer, [step])
        assert optimizer.state_bytes().by_role()["moments"] == 8 * optimizer.selected_entries()
    assert optimizer.selected_entries() == 6 * SUBSPACES[subspace]().entries(torch.Size([20, 16]), 0.2)


def test_a_matrix_without_a_gradient_waits_for_its_basis_and_chooses_when_it_has_one():
    params = matrices(3)
    optimizer = frugal(params, subspace="svd", interval=100)
    events = events_of(optimizer)
    stepped(optimizer, range(4), params[:2])
    assert optimizer.selected_entries() == 2 * 12 * 4
    assert torch.equal(params[2], matrices(3)[2])
    stepped(optimizer, range(4, 6))
    assert optimizer.selected_entries() == 3 * 12 * 4
    assert events == [("refresh", 1), ("continued", 5)]


def test_a_gradient_that_is_not_finite_leaves_the_basis_alone_is_counted_and_said_once():
    params = matrices(2)
    optimizer = stepped(frugal(params, subspace="svd", interval=3, lr=0.0), range(3))
    before = optimizer.state[params[0]]["basis"].clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (3, 4):  # a refresh, and the step after it
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            params[0].grad[0, 0] = float("nan")
            optimizer.step()
            assert torch.equal(optimizer.state[params[0]]["basis"], before)
    assert ["is not finite" in str(w.message) for w in caught] == [True]
    assert optimizer.param_groups[0]["bases_kept"] == 2
    stepped(optimizer, [5])
    assert not torch.equal(optimizer.state[params[0]]["basis"], before), "it chose as soon as it could"


# -- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_such_a_step_is_an_error_or_skipped_whole_or_not_looked_at(bad):
    def one(**settings):
        optimizer = stepped(frugal(matrices(), **settings), range(3))
        params = parameters(optimizer)
        before = str(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        params[4].grad[3, 3] = bad
        return params, optimizer, before

    params, optimizer, (state, weights) = one(nonfinite="skip")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert str(optimizer.state_dict()["state"]) == state
    assert same(params, weights)
    again = frugal(matrices())
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == 1

    params, optimizer, (_, weights) = one(nonfinite="error")
    with pytest.raises(FloatingPointError, match=r"parameter number 4 is not finite at step 4; nothing was changed"):
        optimizer.step()
    assert same(params, weights)

    params, optimizer, _ = one()
    optimizer.step()
    assert not params[4].isfinite().all()


def test_large_and_empty_gradients_are_finite():
    large, empty = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(0, 4))
    optimizer = Frugal([{"params": [large], "split": True, "density": 1.0}, {"params": [empty]}], nonfinite="error")
    large.grad, empty.grad = torch.full_like(large, 1e30), torch.zeros(0, 4)  # the squares of the large are infinite
    optimizer.step()
    assert optimizer.param_groups[0]["steps"] == 1


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_vectors_can_be_state_free_beside_any_subspace_and_have_no_refreshes(subspace):
    params, norm = matrices(), nn.Parameter(torch.ones(8))
    groups = [{"params": params, "split": True}, {"params": [norm], "split": True, "density": 0.0}]
    optimizer = Frugal(groups, lr=0.5, density=0.5, subspace=subspace, interval=1)
    events = []
    optimizer.register_refresh_hook(lambda event: events.append((event.step, event.group)))
    norm.grad = torch.tensor([1.0, -2.0, 0.0, 3.0] * 2)
    stepped(optimizer, range(2), params)
    assert torch.equal(norm, 1 - 2 * 0.5 * norm.grad.sign())
    assert events == [(1, 0), (2, 0)]
    assert optimizer.density == 0.5


def test_a_number_assigned_to_a_group_is_taken_up_by_everything_that_reads_it():
    optimizer = stepped(frugal(matrices(), subspace="columns", interval=100), range(2))
    group = optimizer.param_groups[0]
    group["density"], group["interval"] = 0.25, 3
    optimizer.observe(1.0)
    assert optimizer.interval == 3
    group["interval"] = 5
    assert optimizer.state_dict()["param_groups"][0]["interval"] == {"kind": "constant", "value": 5}
    group["density"] = 0.125
    assert stepped(optimizer, [2]).density == 0.125
    assert optimizer.selected_entries() == 6 * 12 * 1
    for key, value, says in (("density", 2.0, "a density is a share"), ("subspace", "rows", "cannot be changed")):
        before, group[key] = group[key], value
        with pytest.raises(ValueError, match=says):
            optimizer.step()
        group[key] = before


@pytest.mark.parametrize(
    ("subspace", "on_refresh"),
    [(kind, policy) for kind in EVERYWHERE for policy in POLICIES[kind] if policy != "reset_all"],
)
def test_a_density_that_rises_again_makes_room(subspace, on_refresh):
    optimizer = frugal(matrices(), subspace=subspace, on_refresh=on_refresh, density=0.25, interval=2)
    stepped(optimizer, range(3)).param_groups[0]["density"] = 0.75
    stepped(optimizer, range(3, 7))
    assert optimizer.selected_entries() == 6 * SUBSPACES[subspace]().entries(torch.Size([12, 8]), 0.75)
    assert optimizer.state_bytes().by_role()["moments"] == 8 * optimizer.selected_entries()


def test_groups_with_subspaces_of_their_own_and_one_that_resets_everything():
    one, two, other = matrices(3), matrices(3), nn.Parameter(torch.zeros(3))
    groups = [
        {"params": one, "split": True, "subspace": "columns", "on_refresh": "keep_overlap", "interval": 100},
        {"params": two, "split": True, "subspace": "slab", "on_refresh": "reset_all", "interval": 3},
        {"params": [other]},
    ]
    optimizer = stepped(Frugal(groups, density=0.5), range(5))
    steps = [int(optimizer.state[p]["step"]) for p in (one[0], two[0], other)]
    assert steps == [2, 2, 2], "refreshed at step 4"
    assert optimizer.state[one[0]]["indices"].shape == (4,), "what was selected stays"


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_group_may_keep_more_or_less_of_a_density_up_to_all(subspace):
    groups = [
        {"params": matrices(8, (20, 16)), "split": True, "density_scale": scale} for scale in (0.5, 1, 2.5, 1e3)
    ]
    optimizer = Frugal(groups, density=LinearDecay(0.5, 0.1, 8), interval=5, subspace=subspace)
    events, hook = [], lambda event: events.append((event.event, event.group, event.density))
    optimizer.register_refresh_hook(hook)
    for step in range(1, 10):
        stepped(optimizer, [step])
        density = LinearDecay(0.5, 0.1, 8).at(step if step < 9 else 8)
        assert optimizer.density == pytest.approx(density), "as the control has it"
        for group, scale in zip(optimizer.param_groups, (0.5, 1, 2.5, 1e3), strict=True):
            share, kind = min(1.0, scale * density), SUBSPACES[subspace]()
            each = kind.entries(torch.Size([20, 16]), share)
            wanted = round(share * 8) * 320 if subspace == "blocks" else 8 * each
            kept = sum(optimizer.state[param]["entries"] for param in group["params"])
            assert kept == pytest.approx(wanted, rel=kind.grain)
        assert optimizer.state_bytes().by_role()["moments"] == 8 * optimizer.selected_entries()
    assert {group for _, group, _ in events} == {0, 1, 2, 3} and max(d for *_, d in events) < 0.5
    assert not any(group == 3 for event, group, _ in events if event == "shrink"), "it keeps all"


def test_a_density_that_selects_nothing_is_said_and_where_nothing_would_be_trained_refused():
    with pytest.warns(UserWarning, match=r"a density of 0.1 selects nothing of 4 parameters \(blocks\)"):
        stepped(frugal(matrices(4), density=0.1), range(3))
    with pytest.warns(UserWarning, match=r"a density of 0.2 × 0.5 selects nothing of 4 parameters"):
        stepped(frugal(matrices(4), density=0.2, density_scale=0.5), range(1))
    with pytest.raises(ValueError, match="nothing of them would be trained"):
        stepped(frugal(matrices(4), density=0.1, state_free="none"), range(1))


@pytest.mark.parametrize("end", [0.01, 0.0])
@pytest.mark.parametrize("shrink", ["immediately", "at_refresh"])
@pytest.mark.parametrize("subspace", [*SUBSPACES, {"kind": "blocks", "match": "elements"}], ids=str)
def test_where_nothing_else_is_trained_a_falling_density_is_held_at_one_unit(subspace, shrink, end):
    how = {"density": LinearDecay(0.3, end, steps=18), "subspace": subspace, "state_free": "none", "shrink": shrink}
    optimizer = frugal(matrices(7, (8, 6)), **how)
    with pytest.warns(UserWarning, match=r"selects nothing of 7 parameters .* it is held where it selects one unit"):
        for step in range(30):
            before = [param.detach().clone() for param in parameters(optimizer)]
            stepped(optimizer, [step])
            moved = [not torch.equal(*pair) for pair in zip(before, parameters(optimizer), strict=True)]
            assert any(moved) if isinstance(subspace, dict) or subspace == "blocks" else all(moved)
    assert sum(moved) == (7 if isinstance(subspace, str) and subspace != "blocks" else 1)


def test_a_density_that_jumps_to_0_is_held_at_one_unit_too():
    optimizer = stepped(frugal(matrices(7), state_free="none"), range(2))
    optimizer.param_groups[0]["density"] = 0.0
    with pytest.warns(UserWarning, match="it is held"):
        stepped(optimizer, range(2, 20))
    assert optimizer.selected_entries() == 12 * 8


def test_a_group_of_which_nothing_would_be_trained_is_refused():
    with pytest.raises(ValueError, match=r"density is 0 and state_free is 'none'.*leave its parameters out"):
        frugal(matrices(), density=0.0, state_free="none")


def test_a_scalar_can_be_a_block_whatever_becomes_of_its_moments():
    optimizer = frugal([nn.Parameter(torch.ones(()))], density=1.0, on_refresh="keep_overlap", interval=2)
    (state,) = stepped(optimizer, range(5)).state.values()
    assert state["step"] == 5


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subspace", "on_refresh"), [(k, p) for k in SUBSPACES for p in POLICIES[k] if p in ("reset", "keep")]
)
def test_no_state_tensor_holds_more_storage_than_it_shows(subspace, on_refresh):
    # one direction, one column: a slice of a larger tensor would look contiguous
    optimizer = frugal(matrices(4), subspace=subspace, density=LinearDecay(0.5, 0.13, 9), on_refresh=on_refresh)
    for step in range(10):
        stepped(optimizer, [step])
        for name, value in itertools.chain(*(optimizer.state[p].items() for p in parameters(optimizer))):
            if torch.is_tensor(value):
                assert value.untyped_storage().nbytes() == value.nbytes, name


@pytest.mark.parametrize(("on_refresh", "left"), [("reset", [0, 0, 0]), ("keep", [2, 1, 0])])
def test_the_old_basis_is_gone_before_the_next_is_made(on_refresh, left, monkeypatch):
    optimizer = stepped(frugal(matrices(3), subspace="svd", on_refresh=on_refresh, interval=2), range(2))
    old = [weakref.ref(optimizer.state[p]["basis"]) for p in parameters(optimizer)]
    alive, real = [], torch.linalg.svd

    def watched(*args, **settings):
        alive.append(sum(ref() is not None for ref in old))
        return real(*args, **settings)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    stepped(optimizer, [2])
    assert alive == left


# -- fewer bits -------------------------------------------------------------------------------------------------------

quietly = pytest.mark.filterwarnings("ignore:weights in 16 bits", "ignore:moments in bfloat16")


@quietly
@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize(("dtype", "state_dtype"), [*itertools.product([torch.float32, torch.bfloat16], repeat=2)])
def test_moments_are_stored_as_asked_and_the_update_is_made_in_float32(subspace, dtype, state_dtype):
    params = matrices(dtype=dtype)
    optimizer = frugal(params, subspace=subspace, state_dtype=str(state_dtype).removeprefix("torch."))
    reference = frugal([nn.Parameter(p.detach().float()) for p in params], subspace=subspace)
    stepped(optimizer, [1])
    for p, q in zip(params, parameters(reference), strict=True):
        q.grad = p.grad.float()
    reference.step()
    for p, q in zip(params, parameters(reference), strict=True):
        torch.testing.assert_close(p.float(), q.to(dtype).float(), rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq") if optimizer.state[p]["entries"] else ():
            ours, theirs = optimizer.state[p][name], reference.state[q][name]
            assert ours.dtype == state_dtype
            torch.testing.assert_close(ours.float(), theirs.to(ours.dtype).float(), rtol=1e-5, atol=1e-8)
    stepped(optimizer, range(2, 12))
    assert optimizer.state_bytes().by_role()["moments"] == 2 * state_dtype.itemsize * optimizer.selected_entries()
    assert all(p.dtype == dtype and p.isfinite().all() for p in params)


@quietly
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("settings", [{"subspace": "blocks"}, {"density": 0}, {"state_full": "lion"}], ids=str)
def test_a_large_tensor_is_updated_in_slices_with_the_same_result(settings, state_dtype, monkeypatch):
    found = []
    for in_a_slice in (2**22, 24):  # all 96 entries of a tensor at once, and three of its rows
        monkeypatch.setattr("adafrugal.optim.updates._IN_A_SLICE", in_a_slice)
        params, other = matrices(dtype=torch.bfloat16), nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
        groups = [{"params": params, "split": True}, {"params": [other]}]
        optimizer = stepped(Frugal(groups, lr=0.01, interval=3, state_dtype=state_dtype, **settings), range(7))
        states = [torch.as_tensor(value) for p in (*params, other) for value in optimizer.state[p].values()]
        found.append([*params, other, *states])
    assert same(*found)
    assert not any(map(torch.equal, params, matrices(dtype=torch.bfloat16)))


@quietly
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize(("stochastic", "moved"), [(False, 0.0), (True, 100 * 1e-4)])
def test_small_updates_of_bfloat16_weights_are_lost_unless_they_are_rounded_stochastically(stochastic, moved, density):
    param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = frugal([param], lr=1e-4, density=density, stochastic_rounding=stochastic, interval=1000)
    for _ in range(100):
        optimizer.step()
    assert 1 - param.float().mean().item() == pytest.approx(moved, rel=0.05, abs=0)


@quietly
@pytest.mark.parametrize(
    ("settings", "left", "within"),
    [
        ({}, 0.999**500, 1e-3),
        ({"state_dtype": "bfloat16"}, 1.0, 0),
        ({"state_dtype": "bfloat16", "stochastic_rounding": True}, 0.999**500, 0.1),
    ],
)
def test_a_second_moment_in_bfloat16_falls_only_if_it_is_rounded_stochastically(settings, left, within):
    (param,) = params = matrices(1)
    optimizer = frugal(params, density=1.0, interval=10_000, **settings)
    param.grad = torch.ones_like(param)
    optimizer.step()
    first = optimizer.state[param]["exp_avg_sq"].double().mean()
    param.grad = torch.zeros_like(param)
    for _ in range(500):
        optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].double().mean() / first == pytest.approx(left, rel=within)


@pytest.mark.parametrize(
    ("dtype", "settings", "says"),
    [
        (torch.bfloat16, {}, "lose every update under about 1/512"),
        (torch.float32, {"state_dtype": "bfloat16"}, "moments in bfloat16, rounded to the nearest, cannot decrease"),
        (torch.float16, {"stochastic_rounding": True}, "lose every update"),
        (torch.bfloat16, {"stochastic_rounding": True}, None),
    ],
)
def test_weights_that_lose_updates_get_a_warning_and_rounded_ones_do_not(dtype, settings, says):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frugal(matrices(dtype=dtype), **settings)
    assert [says in str(warning.message) for warning in caught] == [True] * bool(says)


def test_stochastic_rounding_continues_bit_for_bit_after_a_round_trip():
    settings = {"stochastic_rounding": True, "state_dtype": "bfloat16", "subspace": "columns"}
    optimizer = stepped(frugal(matrices(dtype=torch.bfloat16), **settings), range(6))
    again = frugal([nn.Parameter(p.detach().clone()) for p in parameters(optimizer)], stochastic_rounding=True)
    again.load_state_dict(optimizer.state_dict())
    assert same(*(parameters(stepped(each, range(6, 12))) for each in (optimizer, again)))
