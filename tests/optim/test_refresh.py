"""What a refresh does to moments, when matrices choose, and what is stored in fewer bits."""

import itertools
import warnings
import weakref

import pytest
import torch
from torch import nn

from adafrugal.optim import Frugal, LinearDecay
from adafrugal.optim.choices import POLICIES
from adafrugal.optim.subspaces import SUBSPACES


def made(n=6, shape=(12, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _ in range(n)]


def stepped(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def frugal(params, **settings):
    return Frugal([{"params": params, "split": True}], **{"density": 0.5, "interval": 4, "lr": 0.01} | settings)


# -- on_refresh -------------------------------------------------------------------------------------------------------


# -- when matrices choose ---------------------------------------------------------------------------------------------


def test_a_staggered_refresh_is_spread_evenly_over_its_steps():
    params = made(6)
    optimizer = frugal(params, subspace="columns", interval=5, stagger=3)
    events, changed = [], []
    optimizer.register_refresh_hook(lambda e: events.append((e.event, e.step)))
    last = [None] * 6
    for step in range(11):
        stepped(optimizer, params, [step])
        now = [optimizer.state[p]["indices"].tolist() for p in params]
        changed.append([i for i in range(6) if now[i] != last[i]])
        last = now
    assert events == [("refresh", 1), ("refresh", 6), ("continued", 7), ("continued", 8), ("refresh", 11)]
    assert changed == [[*range(6)], [], [], [], [], [0, 1], [2, 3], [4, 5], [], [], [0, 1]]


@pytest.mark.parametrize("subspace", ["columns", "rows", "slab", "randk", "randperm", "svd", "random"])
def test_memory_follows_the_density_while_a_refresh_is_spread(subspace):
    params = made(6, (20, 16))
    optimizer = frugal(params, subspace=subspace, density=LinearDecay(0.8, 0.2, 20), interval=7, stagger=5)
    for step in range(30):
        stepped(optimizer, params, [step])
        assert optimizer.state_bytes().by_role()["moments"] == 8 * optimizer.selected_entries()
    kind = SUBSPACES[subspace]()
    assert optimizer.selected_entries() == 6 * kind.entries(params[0].shape, 0.2)


def test_a_matrix_without_a_gradient_waits_for_its_basis_and_chooses_when_it_has_one():
    params = made(3)
    optimizer = frugal(params, subspace="svd", interval=100)
    events = []
    optimizer.register_refresh_hook(lambda e: events.append((e.event, e.step)))
    stepped(optimizer, params[:2], range(3))
    assert optimizer.selected_entries() == 2 * 12 * 4
    untouched = params[2].detach().clone()
    stepped(optimizer, params[:2], [3])
    assert torch.equal(params[2], untouched)
    stepped(optimizer, params, range(4, 6))
    assert optimizer.selected_entries() == 3 * 12 * 4
    assert events == [("refresh", 1), ("continued", 5)]


def test_a_gradient_that_is_not_finite_leaves_the_basis_alone_is_counted_and_said_once():
    params = made(2)
    optimizer = frugal(params, subspace="svd", interval=3, lr=0.0)
    stepped(optimizer, params, range(3))
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
    stepped(optimizer, params, [5])
    assert not torch.equal(optimizer.state[params[0]]["basis"], before), "it chose as soon as it could"


# -- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_such_a_step_is_an_error_or_skipped_whole_or_not_looked_at(bad):
    def one(**settings):
        params = made()
        optimizer = frugal(params, **settings)
        stepped(optimizer, params, range(3))
        before = str(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        params[4].grad[3, 3] = bad
        return params, optimizer, before

    params, optimizer, (state, weights) = one(nonfinite="skip")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert str(optimizer.state_dict()["state"]) == state
    assert all(map(torch.equal, params, weights))
    again = frugal(made())
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == 1

    params, optimizer, (state, weights) = one(nonfinite="error")
    with pytest.raises(FloatingPointError, match=r"parameter number 4 is not finite at step 4; nothing was changed"):
        optimizer.step()
    assert all(map(torch.equal, params, weights))

    params, optimizer, _ = one()
    optimizer.step()
    assert not params[4].isfinite().all()


def test_large_finite_gradients_are_finite():
    params = made(1)
    optimizer = frugal(params, nonfinite="error", density=1.0)
    params[0].grad = torch.full_like(params[0], 1e30)  # its squares are not
    optimizer.step()


def test_an_empty_tensor_has_no_gradient_to_look_at():
    params, empty = made(), nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    optimizer = Frugal([{"params": params, "split": True}, {"params": [empty]}], nonfinite="error")
    stepped(optimizer, params, range(2))


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_vectors_can_be_state_free_beside_any_subspace_and_have_no_turns(subspace):
    params, norm = made(), nn.Parameter(torch.ones(8))
    groups = [{"params": params, "split": True}, {"params": [norm], "split": True, "density": 0.0}]
    optimizer = Frugal(groups, lr=0.5, density=0.5, subspace=subspace, interval=1, on_refresh="reset")
    events = []
    optimizer.register_refresh_hook(lambda event: events.append((event.step, event.group)))
    norm.grad = torch.tensor([1.0, -2.0, 0.0, 3.0] * 2)
    stepped(optimizer, params, range(2))
    assert torch.equal(norm, 1 - 2 * 0.5 * norm.grad.sign())
    assert events == [(1, 0), (2, 0)]
    assert optimizer.density == 0.5


def test_a_number_assigned_to_a_group_is_taken_up_by_everything_that_reads_it():
    params = made()
    optimizer = frugal(params, subspace="columns", interval=100)
    stepped(optimizer, params, range(2))
    group = optimizer.param_groups[0]
    group["density"], group["interval"] = 0.25, 3
    optimizer.observe(1.0)
    assert optimizer.interval == 3
    group["interval"] = 5
    assert optimizer.state_dict()["param_groups"][0]["interval"] == {"kind": "constant", "value": 5}
    group["density"] = 0.125
    stepped(optimizer, params, [2])
    assert optimizer.density == 0.125
    assert optimizer.selected_entries() == 6 * 12 * 1
    for key, value, says in (("density", 2.0, "a density is a share"), ("subspace", "rows", "cannot be changed")):
        before, group[key] = group[key], value
        with pytest.raises(ValueError, match=says):
            optimizer.step()
        group[key] = before


@pytest.mark.parametrize("on_refresh", ["reset", "keep", "keep_overlap"])
@pytest.mark.parametrize("subspace", ["columns", "rows", "slab", "randk", "randperm", "svd"])
def test_a_density_that_rises_again_makes_room(subspace, on_refresh):
    if subspace == "svd" and on_refresh == "keep_overlap":
        return
    params = made()
    optimizer = frugal(params, subspace=subspace, on_refresh=on_refresh, density=0.25, interval=2)
    stepped(optimizer, params, range(3))
    optimizer.param_groups[0]["density"] = 0.75
    stepped(optimizer, params, range(3, 7))
    assert optimizer.selected_entries() == sum(SUBSPACES[subspace]().entries(p.shape, 0.75) for p in params)
    assert optimizer.state_bytes().by_role()["moments"] == 8 * optimizer.selected_entries()


def test_a_turn_that_ends_before_it_is_spread_leaves_no_matrix_behind():
    params = made(10)
    optimizer = frugal(params, subspace="columns", interval=10, stagger=10)
    stepped(optimizer, params, range(10))
    optimizer.param_groups[0]["interval"] = 3
    before = [optimizer.state[p]["indices"] for p in params]
    stepped(optimizer, params, range(10, 17))
    assert not any(torch.equal(optimizer.state[p]["indices"], old) for p, old in zip(params, before, strict=True))


def test_groups_with_subspaces_of_their_own_and_one_that_resets_everything():
    one, two, other = made(3), made(3), nn.Parameter(torch.zeros(3))
    groups = [
        {"params": one, "split": True, "subspace": "columns", "on_refresh": "keep_overlap", "interval": 100},
        {"params": two, "split": True, "subspace": "slab", "on_refresh": "reset_all", "interval": 3},
        {"params": [other]},
    ]
    optimizer = Frugal(groups, density=0.5)
    for step in range(5):
        other.grad = torch.ones(3)
        stepped(optimizer, [*one, *two], [step])
    steps = [int(optimizer.state[p]["step"]) for p in (one[0], two[0], other)]
    assert steps == [2, 2, 2], "refreshed at step 4"
    assert optimizer.state[one[0]]["indices"].shape == (4,), "what was selected stays"


def test_a_density_that_selects_nothing_is_said_and_where_nothing_would_be_trained_refused():
    params = made(4)
    with pytest.warns(UserWarning, match=r"a density of 0.1 selects nothing of 4 parameters \(blocks\)"):
        stepped(frugal(params, density=0.1), params, range(3))
    with pytest.raises(ValueError, match="nothing of them would be trained"):
        stepped(frugal(params, density=0.1, state_free="none"), params, range(1))


def test_a_scalar_can_be_a_block_whatever_becomes_of_its_moments():
    scalar = nn.Parameter(torch.ones(()))
    optimizer = frugal([scalar], density=1.0, on_refresh="keep_overlap", interval=2)
    for _ in range(5):
        scalar.grad = torch.ones(())
        optimizer.step()
    assert optimizer.state[scalar]["step"] == 5


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_refresh", ["reset", "keep"])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_no_state_tensor_holds_more_storage_than_it_shows(subspace, on_refresh):
    params = made(4, (12, 8))
    if on_refresh not in POLICIES[subspace]:
        return
    # one direction, one column: a slice of a larger tensor would look contiguous
    optimizer = frugal(params, subspace=subspace, density=LinearDecay(0.5, 0.13, 9), on_refresh=on_refresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(14):
            stepped(optimizer, params, [step])
            for p in params:
                for name, value in optimizer.state[p].items():
                    if torch.is_tensor(value):
                        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


@pytest.mark.parametrize("on_refresh", ["reset", "keep"])
def test_the_old_basis_is_gone_before_the_next_is_made(on_refresh, monkeypatch):
    params = made(3)
    optimizer = frugal(params, subspace="svd", on_refresh=on_refresh, interval=2)
    stepped(optimizer, params, range(2))
    old = [weakref.ref(optimizer.state[p]["basis"]) for p in params]
    alive, real = [], torch.linalg.svd

    def watched(*args, **settings):
        alive.append(sum(ref() is not None for ref in old))
        return real(*args, **settings)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    stepped(optimizer, params, [2])
    assert alive == ([0, 0, 0] if on_refresh == "reset" else [2, 1, 0])


# -- fewer bits -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:weights in 16 bits", "ignore:moments in bfloat16")
@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize(("dtype", "state_dtype"), [*itertools.product(["float32", "bfloat16"], repeat=2)])
def test_moments_are_stored_as_asked_and_the_update_is_made_in_float32(subspace, dtype, state_dtype):
    dtype, size = getattr(torch, dtype), {"float32": 4, "bfloat16": 2}[state_dtype]
    params, exact = made(dtype=dtype), made(dtype=dtype)
    optimizer = frugal(params, subspace=subspace, state_dtype=state_dtype)
    reference = frugal([nn.Parameter(p.detach().float()) for p in exact], subspace=subspace)
    stepped(optimizer, params, [1])
    for p, q in zip(params, reference.param_groups[0]["params"], strict=True):
        q.grad = p.grad.float()
    reference.step()
    for p, q in zip(params, reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p.float(), q.to(dtype).float(), rtol=1e-5, atol=1e-6)
        if optimizer.state[p]["entries"]:
            for name in ("exp_avg", "exp_avg_sq"):
                ours, theirs = optimizer.state[p][name], reference.state[q][name]
                assert ours.dtype == getattr(torch, state_dtype)
                torch.testing.assert_close(ours.float(), theirs.to(ours.dtype).float(), rtol=1e-5, atol=1e-8)
    stepped(optimizer, params, range(2, 12))
    assert optimizer.state_bytes().by_role()["moments"] == 2 * size * optimizer.selected_entries()
    assert all(p.dtype == dtype and p.isfinite().all() for p in params)


@pytest.mark.filterwarnings("ignore:weights in 16 bits", "ignore:moments in bfloat16")
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("settings", [{"subspace": "blocks"}, {"density": 0}, {"state_full": "lion"}], ids=str)
def test_a_large_tensor_is_updated_in_slices_with_the_same_result(settings, state_dtype, monkeypatch):
    found = []
    for in_a_slice in (2**22, 24):  # all 96 entries of a tensor at once, and three of its rows
        monkeypatch.setattr("adafrugal.optim.updates._IN_A_SLICE", in_a_slice)
        params, other = made(dtype=torch.bfloat16), nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
        groups = [{"params": params, "split": True}, {"params": [other]}]
        optimizer = Frugal(groups, lr=0.01, interval=3, state_dtype=state_dtype, **settings)
        for step in range(7):
            other.grad = torch.linspace(-1, 1, 40).bfloat16() + step / 10
            stepped(optimizer, params, [step])
        found.append([*params, other, *(v for p in (*params, other) for v in optimizer.state[p].values())])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*found, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(params, made(dtype=torch.bfloat16), strict=True))


def test_small_updates_of_bfloat16_weights_are_lost_unless_they_are_rounded_stochastically():
    def moved(stochastic, density):
        param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = frugal([param], lr=1e-4, density=density, stochastic_rounding=stochastic, interval=1000)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return 1 - param.float().mean().item()

    for density in (0.0, 1.0):
        assert moved(False, density) == 0.0
        assert moved(True, density) == pytest.approx(100 * 1e-4, rel=0.05)


def test_weights_that_lose_updates_get_a_warning_and_rounded_ones_do_not():
    with pytest.warns(UserWarning, match="lose every update under about 1/512"):
        frugal(made(dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="moments in bfloat16, rounded to the nearest, cannot decrease"):
        frugal(made(), state_dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frugal(made(dtype=torch.bfloat16), stochastic_rounding=True)
    with pytest.warns(UserWarning, match="lose every update"):
        frugal(made(dtype=torch.float16), stochastic_rounding=True)


def test_a_second_moment_in_bfloat16_falls_only_if_it_is_rounded_stochastically():
    def left(**settings):
        params = made(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = frugal(params, density=1.0, interval=10_000, **settings)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        first = optimizer.state[params[0]]["exp_avg_sq"].double().mean()
        for _ in range(500):
            params[0].grad = torch.zeros_like(params[0])
            optimizer.step()
        return (optimizer.state[params[0]]["exp_avg_sq"].double().mean() / first).item()

    assert left() == pytest.approx(0.999**500, rel=1e-3)
    assert left(state_dtype="bfloat16") == 1.0
    assert left(state_dtype="bfloat16", stochastic_rounding=True) == pytest.approx(0.999**500, rel=0.1)


def test_stochastic_rounding_continues_bit_for_bit_after_a_round_trip():
    params = made(dtype=torch.bfloat16)
    settings = {"stochastic_rounding": True, "state_dtype": "bfloat16", "subspace": "columns"}
    optimizer = frugal(params, **settings)
    stepped(optimizer, params, range(6))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    again = frugal(twins, stochastic_rounding=True)
    again.load_state_dict(optimizer.state_dict())
    for optimizer_, tensors in ((optimizer, params), (again, twins)):
        stepped(optimizer_, tensors, range(6, 12))
    assert all(map(torch.equal, params, twins))
