"""Moments in 8 bits, in every subspace and through saving: what is stored, what it costs, and that it goes on alike."""


import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from stepping import frugal, matrices, parameters, same, saved_and_loaded, stepped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adafrugal.optim import Frugal, LinearDecay, UpdateInBackward, storage
from adafrugal.optim.choices import POLICIES, SUBSPACES
from adafrugal.optim.eight_bits import BLOCK, decode, encode

LARGE = [(40, 300), (64, 64), (30, 520)]
MOVING = {"density": LinearDecay(0.6, 0.2, steps=12), "interval": 3}


@pytest.fixture
def all_in_codes(monkeypatch):
    """Small matrices count as large."""
    for name in ("_FEWEST", "_SHORTEST"):
        monkeypatch.setattr(storage, name, 1)


def coded(params, **settings):
    return frugal(params, state_dtype="int8", **settings)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_update_is_made_in_float32_and_its_moments_stored_to_within_a_code(subspace):
    params, others = matrices(LARGE), matrices(LARGE)
    ours, theirs = (f(p, subspace=subspace) for f, p in ((coded, params), (frugal, others)))
    for optimizer in (ours, theirs):
        stepped(optimizer, [1])
    assert same(params, others), "the first step begins with moments of 0"
    for p, q in zip(params, others, strict=True):
        for name in ("exp_avg", "exp_avg_sq") if ours.state[p]["entries"] else ():
            codes, scales = ours.state[p][name], ours.state[p][f"{name}_scale"]
            exact = theirs.state[q][name]
            most = torch.iinfo(codes.dtype).max
            assert (decode(codes, scales) - exact).abs().max() <= 4 / most * exact.abs().max()
    stepped(ours, range(2, 9))
    assert all(p.isfinite().all() for p in params)


def test_a_step_count_stays_the_tensor_that_it_is():
    """Another stream may still read it when the next operation is queued."""
    optimizer = coded(matrices(LARGE), density=1.0)
    stepped(optimizer, [0])
    counts = [state["step"] for state in optimizer.state.values()]
    stepped(optimizer, [1])
    assert all(state["step"] is count for state, count in zip(optimizer.state.values(), counts, strict=True))
    assert {float(count) for count in counts} == {2.0}


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_bytes_are_one_an_entry_and_four_a_block_of_a_row(subspace):
    optimizer = stepped(coded(matrices(LARGE), subspace=subspace), range(5))
    moments = sum(roles.get("moments", 0) for roles in optimizer.state_bytes().values())
    scales = sum(v.nbytes for s in optimizer.state.values() for name, v in s.items() if name.endswith("_scale"))
    assert moments == 2 * optimizer.selected_entries() + scales
    for state in optimizer.state.values():
        if state["entries"]:
            shape = state["exp_avg"].shape
            rows, length = (1, shape[0]) if len(shape) == 1 else shape
            assert state["exp_avg_scale"].shape == (rows, -(-length // BLOCK))


def test_vectors_small_and_narrow_matrices_keep_float32():
    params = [*matrices([(64, 64), (64, 63), (4096, 15)]), nn.Parameter(torch.ones(5000))]
    groups = [{"params": params}, {"params": matrices([(2, 2)]), "split": True, "density": 1.0}]
    optimizer = stepped(Frugal(groups, state_dtype="int8"), [0])
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.int8, *[torch.float32] * 3]
    assert [optimizer.state[p]["exp_avg_scale"].numel() for p in params] == [64, 0, 0, 0]


def test_float64_weights_keep_float64_and_any_shape_has_rows():
    double, image = matrices([(64, 64)], torch.float64) + matrices([(32, 3, 5, 60)])
    optimizer = stepped(Frugal([{"params": [double, image], "split": False}], state_dtype="int8"), range(3))
    assert optimizer.state[double]["exp_avg"].dtype == torch.float64
    assert optimizer.state[image]["exp_avg_scale"].shape == (32, -(-3 * 5 * 60 // BLOCK))


def test_maximize_is_descent_of_the_negative():
    ends = []
    for sign in (1, -1):
        params = matrices(LARGE)
        optimizer = coded(params, density=0.5, interval=3, subspace="columns", maximize=sign < 0)
        for step in range(7):
            for i, param in enumerate(params):
                generator = torch.Generator().manual_seed(100 * step + i)
                param.grad = sign * torch.randn(param.shape, generator=generator)
            optimizer.step()
        ends.append(params)
    assert same(*ends)


def test_a_second_moment_falls_as_it_should():
    (param,) = params = matrices([(64, 64)])
    optimizer = coded(params, density=1.0, interval=10_000)
    param.grad = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    optimizer.step()
    first = second_moment(optimizer, param).mean()
    param.grad = torch.zeros_like(param)
    for _ in range(500):
        optimizer.step()
    assert second_moment(optimizer, param).mean() / first == pytest.approx(0.999**500, rel=0.01)


def second_moment(optimizer, param):
    return decode(optimizer.state[param]["exp_avg_sq"], optimizer.state[param]["exp_avg_sq_scale"])


@pytest.mark.parametrize(("subspace", "on_refresh"), [(k, p) for k in SUBSPACES for p in POLICIES[k]])
def test_it_goes_on_bit_for_bit_from_a_saved_state(subspace, on_refresh, all_in_codes):
    settings = {"subspace": subspace, "on_refresh": on_refresh, **MOVING}
    optimizer = stepped(coded(matrices(), **settings), range(7))
    again = frugal([nn.Parameter(p.detach().clone()) for p in parameters(optimizer)])
    with pytest.warns(UserWarning, match="the saved state replaces settings"):
        again.load_state_dict(saved_and_loaded(optimizer))
    assert again.state_bytes() == optimizer.state_bytes()
    assert same(*(parameters(stepped(each, range(7, 16))) for each in (optimizer, again)))


@pytest.mark.parametrize("subspace", ["columns", "rows", "slab", "randk", "randperm"])
def test_moments_that_stay_when_density_falls_are_those_from_before(subspace, all_in_codes):
    moved, still = params = matrices([(12, 20), (12, 300)])
    optimizer = stepped(coded(params, subspace=subspace, density=0.5, interval=100), range(4))
    before = dict(optimizer.state[still])
    optimizer.param_groups[0]["density"], still.grad = 0.25, None
    stepped(optimizer, [4], [moved])
    after, part = optimizer.state[still], optimizer.param_groups[0]["subspace"]
    old, new = ({name: state[name] for name in part.remembers} for state in (before, after))
    for name, is_signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = decode(before[name], before[f"{name}_scale"])
        cut = encode(part.narrow(values, still.shape, old, new), is_signed)
        assert len(cut[0].view(-1)) < len(values.view(-1))
        assert same((after[name], after[f"{name}_scale"]), cut)


@pytest.mark.parametrize("subspace", ["columns", "rows", "slab", "randk", "randperm", "svd"])
@pytest.mark.parametrize("on_refresh", ["keep", "keep_overlap"])
def test_moments_that_stay_at_a_refresh_are_those_of_float32(subspace, on_refresh, all_in_codes):
    if on_refresh not in POLICIES[subspace]:
        pytest.skip("not a policy of this subspace")
    ends = []
    for state_dtype in (None, "int8"):
        (param,) = params = matrices([(70, 90)])
        settings = {"subspace": subspace, "on_refresh": on_refresh, "density": 0.5, "interval": 4}
        state = stepped(frugal(params, state_dtype=state_dtype, **settings), range(5)).state[param]
        ends.append(state)
    plain, ours = ends
    assert torch.equal(plain["step"], ours["step"])
    for name in ("exp_avg", "exp_avg_sq"):
        found = decode(ours[name], ours[f"{name}_scale"])
        assert (found - plain[name]).norm() / plain[name].norm() < 0.03


@pytest.mark.parametrize("settings", [{}, {"state_full": "lion"}, {"density": 0.0}], ids=str)
def test_slices_of_a_large_tensor_are_updated_alike(settings, all_in_codes, monkeypatch):
    found = []
    for in_a_slice in (2**22, 600):
        monkeypatch.setattr("adafrugal.optim.updates._IN_A_SLICE", in_a_slice)
        params, other = matrices(LARGE), nn.Parameter(torch.ones(40, 30))
        groups = [{"params": params, "split": True}, {"params": [other]}]
        optimizer = stepped(Frugal(groups, lr=0.01, interval=3, state_dtype="int8", **settings), range(7))
        states = [torch.as_tensor(value) for p in (*params, other) for value in optimizer.state[p].values()]
        found.append([*params, other, *states])
    assert same(*found)


def test_updates_in_the_backward_pass_are_the_same():
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 70))
        split = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": split, "split": True}, {"params": others}]
        optimizer = Frugal(groups, state_dtype="int8", interval=3, density=0.5)
        if in_backward:
            UpdateInBackward(optimizer)
        for step in range(8):
            model(torch.randn(4, 70, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([*model.parameters(), *(torch.as_tensor(v) for s in optimizer.state.values() for v in s.values())])
    assert same(*found)


@pytest.mark.parametrize("scales", [None, torch.ones(0), torch.ones(1, 1), torch.ones(6, 2)])
def test_a_state_without_its_scales_is_refused_and_nothing_changes(scales, all_in_codes):
    optimizer = stepped(coded(matrices(3 * [(6, 10)]), density=1.0), range(3))
    saved, says = saved_and_loaded(optimizer), "number 1 lacks exp_avg_scale"
    del saved["state"][1]["exp_avg_scale"]
    if scales is not None:
        saved["state"][1]["exp_avg_scale"] = scales
        says = f"exp_avg_scale of parameter number 1 has shape {list(scales.shape)}; its whole has [6, 1]"
    before = [p.detach().clone() for p in parameters(optimizer)]
    with pytest.raises(ValueError, match=re.escape(says)):
        optimizer.load_state_dict(saved)
    assert same(parameters(optimizer), before)


@pytest.mark.parametrize("given", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("saved", [None, "bfloat16", "int8"])
@pytest.mark.filterwarnings("ignore:moments in bfloat16", "ignore:the saved state", "ignore:torch.distributed is")
def test_torchs_checkpoint_is_read_whatever_was_given(saved, given, tmp_path, all_in_codes):
    one, other = (named(dtype) for dtype in (saved, given))
    stepped(one, range(4))
    dcp.save({"optimizer": one.state_dict()}, checkpoint_id=tmp_path)
    reader = dcp.FileSystemReader(tmp_path)
    other.prepare_for_load(reader.read_metadata().state_dict_metadata)
    found = {"optimizer": other.state_dict()}
    dcp.load(found, storage_reader=reader)
    other.load_state_dict(found["optimizer"])
    with torch.no_grad():
        for p, q in zip(parameters(other), parameters(one), strict=True):
            p.copy_(q)
    assert same(*(parameters(stepped(each, range(4, 9))) for each in (one, other)))


def named(state_dtype):
    groups = [{"params": [(str(i), p) for i, p in enumerate(matrices())], "split": True}]
    return Frugal(groups, subspace="columns", density=0.5, interval=3, state_dtype=state_dtype)


@pytest.mark.parametrize("now", [None, "bfloat16"])
def test_a_group_that_is_given_another_dtype_goes_on_with_its_codes_until_moments_begin_anew(now):
    (param,) = params = matrices([(64, 64)])
    optimizer = stepped(coded(params, density=1.0, interval=4), range(2))
    optimizer.param_groups[0]["state_dtype"] = now
    assert stepped(optimizer, [2]).state[param]["exp_avg"].dtype == torch.int8
    assert stepped(optimizer, range(3, 6)).state[param]["exp_avg"].dtype == getattr(torch, now or "float32")
    assert not optimizer.state[param].get("exp_avg_scale", torch.empty(0)).numel()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_matrices_that_are_sharded_by_columns_keep_float32(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        by_rows, by_columns = (
            nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(axis)])) for axis in (0, 1)
        )
        for param in (by_rows, by_columns):
            param.grad = torch.ones_like(param)
        optimizer = Frugal([{"params": [by_rows, by_columns], "split": False}], state_dtype="int8")
        optimizer.step()
        dtypes = [optimizer.state[param]["exp_avg"].dtype for param in (by_rows, by_columns)]
    finally:
        dist.destroy_process_group()
    assert dtypes == [torch.int8, torch.float32]


def test_a_change_that_fails_forgets_the_moments_with_their_scales(all_in_codes, monkeypatch):
    optimizer = stepped(coded(matrices([(12, 20)]), subspace="columns", density=0.5, interval=100), range(3))
    optimizer.param_groups[0]["density"] = 0.25
    (param,) = parameters(optimizer)

    def failing(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("adafrugal.optim.subspaces.coordinates.Columns.narrow", failing)
        with pytest.raises(KeyboardInterrupt):
            stepped(optimizer, [3])
    assert [len(optimizer.state[param][name]) for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq_scale")] == [0, 0, 0]
    stepped(optimizer, [4])
    assert optimizer.state[param]["exp_avg"].dtype == torch.int8
