"""States that travel: what is saved, what is refused before anything changes, and torch.distributed.checkpoint."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from stepping import frugal, matrices, parameters, same, saved_and_loaded, stepped
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adafrugal.optim import Frugal, LinearDecay, LossAware, Several, split_parameters
from adafrugal.optim.controls import Control
from adafrugal.optim.subspaces import SUBSPACES

OLDER = Path(__file__).with_name("older_states.pt")
TRAVELLING = ["blocks", "columns", "slab", "svd"]
TORCHS = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)", "ignore:TypedStorage")


def named(names="abcd", shape=(6, 6), seed=0):
    """Matrices of one shape, each named by a letter and filled by it."""
    made = matrices([shape] * 26, seed=seed)
    return [(name, made[ord(name) - ord("a")]) for name in names]


def arranged(names, **settings):
    return Frugal([{"params": named(names), "split": True}], **{"density": 0.5, "subspace": "columns"} | settings)


def snapshot(optimizer):
    """Everything a load could change."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    order = [id(p) for p in parameters(optimizer)]
    return copy.deepcopy(optimizer.state_dict()), copy.deepcopy(groups), order, copy.deepcopy(parameters(optimizer))


def unchanged(optimizer, before):
    return repr(snapshot(optimizer)) == repr(before)


# -- keys and values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("on_refresh", ["reset", "reset_all"])
def test_a_states_keys_stay_and_its_values_are_tensors_and_numbers(subspace, on_refresh):
    params = matrices()
    others = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = Frugal(
        [{"params": params, "split": True}, {"params": others}],
        density=LinearDecay(0.9, 0.0, steps=8), interval=3, subspace=subspace, on_refresh=on_refresh,
    )  # fmt: skip
    keys = {number: entry.keys() for number, entry in optimizer.state_dict()["state"].items()}
    assert len(keys) == len(params) + len(others), "before the first step, too"
    for step in range(12):
        stepped(optimizer, [step], [*params[:-1], others[0]])  # two never have a gradient
        states = optimizer.state_dict()["state"]
        assert {number: entry.keys() for number, entry in states.items()} == keys
        assert [optimizer.state[p].keys() for p in (*params, *others)] == list(keys.values())
        assert all(type(v) in (torch.Tensor, int) for entry in states.values() for v in entry.values())


def through_torchs_checkpoint(state, optimizer, directory):
    """A state by a checkpoint of torch, which an older version had written; its keys came and went."""
    dcp.save({"optimizer": state}, checkpoint_id=directory)
    reader = dcp.FileSystemReader(directory)
    optimizer.prepare_for_load(reader.read_metadata().state_dict_metadata)
    found = {"optimizer": optimizer.state_dict()}
    dcp.load(found, storage_reader=reader, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    return found["optimizer"]


@TORCHS
@pytest.mark.parametrize("by_torch", [False, True])
def test_an_older_state_is_loaded_and_training_goes_on(tmp_path, by_torch):
    """The file was saved by commit f852912: states after 7 steps, and the weights then and after 14."""
    older = torch.load(OLDER, weights_only=True)
    assert older["svd"]["state"]["state"][0]["side"] == "left", "as it was saved then"
    for subspace, saved in older.items():
        params = [nn.Parameter(w.clone()) for w in saved["weights"]]
        names = [f"layers.{i}.weight" for i in range(3)]
        groups = [{"params": list(zip(names, params[:3], strict=True)), "split": True}]
        groups += [{"params": [("norm.weight", params[3])]}]
        optimizer = Frugal(groups, lr=0.01, density=LinearDecay(0.7, 0.3, steps=10),
                           interval=LossAware(4, 9, factor=1.5), subspace=subspace)  # fmt: skip
        state = saved["state"]
        optimizer.load_state_dict(
            through_torchs_checkpoint(state, optimizer, tmp_path / subspace) if by_torch else state
        )
        assert not any(isinstance(v, str) for state in optimizer.state.values() for v in state.values())
        stepped(optimizer, range(7, 14), params)
        torch.testing.assert_close([p.detach() for p in params], saved["after"])


# -- a load that is refused -------------------------------------------------------------------------------------------


class Own(Control):
    """A control that an optimizer made with built-in ones does not know."""

    kind = "own"

    def at(self, step):
        return 0.5


def test_a_refused_load_changes_nothing():
    """Also one that torch itself would take, and whose fault is in the last group."""

    def made(control=0.5, subspace="columns", names="efgh"):
        groups = [{"params": named("abcd"), "split": True}, {"params": named(names), "split": True, "density": control}]
        return Frugal(groups, subspace=subspace)

    optimizer = stepped(made(), range(3))
    good = stepped(made(), range(5)).state_dict()
    own, renamed = (stepped(other, range(5)).state_dict() for other in (made(Own()), made(names="efgz")))
    lacking, shorter, vector = (copy.deepcopy(good) for _ in range(3))
    del lacking["state"][7]["indices"]
    shorter["state"][7]["exp_avg_sq"] = shorter["state"][7]["exp_avg_sq"][:, :-1]
    vector["param_groups"][1]["on_refresh"] = "sometimes"
    before = snapshot(optimizer)
    for wrong, says in (
        (own, "kind is 'own'"),
        (renamed, "only it has z; only this optimizer has h"),
        (lacking, "the saved state of parameter h lacks indices"),
        (shorter, "exp_avg_sq of parameter h has shape"),
        (vector, "on_refresh with columns is 'sometimes'"),
    ):
        with pytest.raises(ValueError, match=says):
            optimizer.load_state_dict(wrong)
        assert unchanged(optimizer, before), says
    optimizer.load_state_dict(good)
    assert not unchanged(optimizer, before)


def test_of_several_optimizers_none_is_changed_when_one_refuses():
    def made(names):
        return Several(torch.optim.SGD(matrices([(2, 2)]), lr=0.1, momentum=0.9), arranged(names))

    several, other = (stepped(made(names), range(3)) for names in ("ab", "yz"))
    before = repr(several.state_dict()), [id(group) for group in several.param_groups]
    with pytest.raises(ValueError, match="only it has y, z"):
        several.load_state_dict(other.state_dict())
    assert (repr(several.state_dict()), [id(group) for group in several.param_groups]) == before
    assert several.param_groups[0] is several.parts[0].param_groups[0]


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_a_pre_hook_can_mend_a_state_that_would_be_refused():
    saved = stepped(arranged("abc"), range(3)).state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [f"net.{name}" for name in group["param_names"]]
    optimizer = arranged("abc")
    with pytest.raises(ValueError, match=r"only it has net\.a, net\.b, net\.c; only this .* a, b, c"):
        optimizer.load_state_dict(saved)

    def rename(_, given):
        groups = [g | {"param_names": [n.removeprefix("net.") for n in g["param_names"]]}
                  for g in given["param_groups"]]  # fmt: skip
        return {**given, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["steps"] == 3
    assert saved["param_groups"][0]["param_names"][0] == "net.a", "what was given stays"


def test_a_post_hook_finds_everything_loaded_and_has_the_last_word():
    saved = stepped(arranged("abc", interval=LossAware(7, 90)), range(3)).state_dict()
    optimizer, seen = arranged("abc", interval=LossAware(7, 90)), []

    def after(loaded):
        seen.append((loaded.interval, loaded.density, loaded.param_groups[0]["subspace"].kind))
        for state in loaded.state.values():
            state["exp_avg"].zero_()

    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(saved)
    assert seen == [(7, 0.5, "columns")]
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())


def test_a_hook_of_state_dict_gets_plain_values_and_can_replace_them():
    optimizer, seen = stepped(arranged("abc"), range(2)), []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved["param_groups"][0]["density"]))
    optimizer.register_state_dict_post_hook(lambda _, saved: {"wrapped": saved})
    assert list(optimizer.state_dict()) == ["wrapped"]
    assert seen == [{"kind": "constant", "value": 0.5}]


# -- names and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_parameters_are_matched_by_name(subspace):
    how = {"subspace": subspace, "density": LinearDecay(0.9, 0.3, steps=12), "interval": 4, "seed": 2}
    one, other = arranged("abcd", **how), arranged("dbac", **how)
    weights = dict(zip("dbac", parameters(other), strict=True))
    stepped(one, range(6))
    with torch.no_grad():
        for name, param in zip("abcd", parameters(one), strict=True):
            weights[name].copy_(param)
    other.load_state_dict(saved_and_loaded(one))
    assert other.param_groups[0]["param_names"] == list("abcd")
    for optimizer in (one, other):
        stepped(optimizer, range(6, 14))
    assert same(parameters(one), [weights[name] for name in "abcd"])


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_names_are_those_without_torchs_wrappers(wrapper):
    saved = stepped(arranged("abc"), range(2)).state_dict()
    wrapped = Frugal([{"params": [(f"{wrapper}{n}", p) for n, p in named("cab")], "split": True}],
                     density=0.5, subspace="columns")  # fmt: skip
    wrapped.load_state_dict(saved)
    assert wrapped.param_groups[0]["param_names"] == [f"{wrapper}{n}" for n in "abc"], "the optimizer's own"


def test_without_names_parameters_are_matched_by_place():
    saved = stepped(arranged("ab"), range(2)).state_dict()
    del saved["param_groups"][0]["param_names"]
    optimizer = arranged("ba")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["b", "a"]
    assert torch.equal(optimizer.state[parameters(optimizer)[0]]["exp_avg"], saved["state"][0]["exp_avg"])


def test_settings_that_differ_are_listed_in_one_warning():
    moving = {"density": LinearDecay(0.5, 0.1, steps=20), "interval": LossAware(4, 9, factor=1.5)}
    saved = stepped(arranged("abc", lr=0.01, weight_decay=0.1, **moving), range(3)).state_dict()
    other = arranged("abc", lr=0.02, density=0.25, interval=LossAware(5, 9, factor=1.5), weight_decay=0.1)
    with pytest.warns(UserWarning) as said:
        other.load_state_dict(saved)
    (line,) = [str(each.message) for each in said]
    assert line.startswith("the saved state replaces settings that were given: lr 0.01 (given: 0.02); density {'kind'")
    assert "'start': 0.5, 'end': 0.1, 'steps': 20} (given: {'kind': 'constant', 'value': 0.25})" in line
    assert line.endswith("; interval.start 4 (given: 5)")
    assert "weight_decay" not in line
    assert other.param_groups[0]["lr"] == 0.01


def test_what_schedulers_and_losses_moved_is_no_difference():
    def made():
        optimizer = arranged("abc", lr=0.01, interval=LossAware(4, 9, factor=1.5))
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    (optimizer, scheduler), (other, _) = made(), made()
    for step in range(4):
        stepped(optimizer, [step])
        scheduler.step()
        optimizer.observe(2.0)
    assert optimizer.interval > 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"], "as it was, with its schedule"


def test_a_saved_group_without_a_setting_takes_the_given_one():
    saved = stepped(arranged("abc"), range(3)).state_dict()
    for key in ("density", "interval", "subspace", "on_refresh", "state_full", "waiting", "bases_kept"):
        del saved["param_groups"][0][key]
    optimizer = arranged("abc", interval=7)
    optimizer.load_state_dict(saved)
    assert optimizer.interval == 7
    assert stepped(optimizer, range(3, 9)).param_groups[0]["steps"] == 9


# -- the step that only initialises -----------------------------------------------------------------------------------


def initialised(optimizer):
    """As torchtitan and torch.distributed.checkpoint do it: a step with gradients of zeros and a rate of 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()
    return optimizer


class Model(nn.Module):
    """Blocks of two matrices and a vector, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6)) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def optimizer(self, subspace, **settings):
        moving = {"density": LinearDecay(0.6, 0.1, steps=10), "interval": 4, "lr": 0.01}
        return Frugal(split_parameters(self), subspace=subspace, **{**moving, **settings})

    def go(self, optimizer, steps):
        """Step with random gradients, sharded as the parameters are."""
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for param in self.parameters():
                grad = torch.randn(param.shape, generator=generator)
                sharded = hasattr(param, "placements")
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if sharded else grad
            optimizer.step()
            optimizer.zero_grad()
        return optimizer


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("flat", [False, True])
def test_reading_a_state_changes_nothing(subspace, flat):
    read, other = Model(), Model()
    optimizers = [model.optimizer(subspace) for model in (read, other)]
    for steps in (range(0), range(3), range(3, 8)):
        read.go(optimizers[0], steps)
        get_optimizer_state_dict(read, optimizers[0], options=StateDictOptions(flatten_optimizer_state_dict=flat))
    other.go(optimizers[1], range(8))
    assert same(read.parameters(), other.parameters())
    assert optimizers[0].checksum() == optimizers[1].checksum()


@pytest.mark.parametrize("subspace", TRAVELLING)
def test_an_unstepped_state_is_loaded_as_one(subspace):
    """As accelerate's `prepare` does, which may exchange the parameters afterwards; also into one that has stepped."""
    one, other = Model(), Model()
    ours, theirs = one.optimizer(subspace), other.optimizer(subspace)
    fresh, weights = saved_and_loaded(ours), copy.deepcopy(one.state_dict())
    one.go(ours, range(20, 24))
    ours.load_state_dict(fresh)
    one.load_state_dict(weights)
    assert not ours.state
    one.go(ours, range(6))
    other.go(theirs, range(6))
    assert same(one.parameters(), other.parameters())


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_weight_decay_of_10_shows(density):
    """Also with gradients of 0, of which every rule makes no update."""
    optimizer = frugal(matrices(), lr=0.01, weight_decay=10.0, density=density, subspace="columns")
    for _ in range(2):
        initialised_at(optimizer, 0.01)
    torch.testing.assert_close([p.detach() for p in parameters(optimizer)], [0.81 * p.detach() for p in matrices()])


@pytest.mark.parametrize("subspace", TRAVELLING)
def test_a_dummy_step_leaves_no_trace(subspace):
    one, other = Model(), Model()
    ours, theirs = (model.optimizer(subspace, weight_decay=10.0) for model in (one, other))
    initialised(initialised(ours))
    assert same(one.parameters(), other.parameters())
    assert [ours.param_groups[0][key] for key in ("steps", "refreshes", "since_refresh")] == [0, 0, 0]
    assert ours.selected_entries() == 0
    one.go(ours, range(8))
    other.go(theirs, range(8))
    assert same(one.parameters(), other.parameters())
    assert ours.checksum() == theirs.checksum()
    assert ours.state_bytes() == theirs.state_bytes()


class Reads(TorchDispatchMode):
    """Counts the calls that look at values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.any, torch.ops.aten._local_scalar_dense)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("zero", ["rate", "gradients"])
def test_a_first_step_with_a_rate_of_0_or_gradients_of_0_is_a_step(zero):
    """As with a warm-up that begins at 0; no later step looks at gradients."""
    optimizer = frugal(matrices(), lr=0.0 if zero == "rate" else 0.1, density=1.0, fused=False, compile=False)
    stepped(optimizer, [0]) if zero == "rate" else initialised_at(optimizer, 0.1)
    assert optimizer.param_groups[0]["steps"] == 1
    state = optimizer.state[parameters(optimizer)[0]]
    assert state["entries"]
    assert bool(state["exp_avg"].any()) == (zero == "rate")


def initialised_at(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return optimizer


def test_no_later_step_looks_at_gradients():
    optimizer = initialised_at(stepped(frugal(matrices(), lr=0.1, density=0.0, compile=False), [0]), 0.0)
    assert optimizer.param_groups[0]["steps"] == 2, "gradients and rate of 0, but not the first"
    with Reads() as reads:
        initialised_at(optimizer, 0.0)
    assert (optimizer.param_groups[0]["steps"], reads.count) == (3, 0)


# -- torch.distributed.checkpoint -------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    """One process, and torch's collectives."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def written(directory, model, optimizer, **options):
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=directory)


def read(directory, model, optimizer, **options):
    """Read a checkpoint as in the docstring of `prepare_for_load`."""
    reader, options = dcp.FileSystemReader(directory), StateDictOptions(**options)
    optimizer.prepare_for_load(reader.read_metadata().state_dict_metadata)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, storage_reader=reader)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


@TORCHS
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("subspace", [*TRAVELLING, "randk", {"kind": "svd", "side": "left"}], ids=str)
def test_a_checkpoint_of_torch_goes_on_bit_for_bit_after_density_fell(tmp_path, subspace, flat):
    """Into an optimizer as it is made, and into one that has trained on; a refresh comes later in both."""
    saved, fresh, trained = Model(), Model(), Model()
    ours, new, old = (model.optimizer(subspace) for model in (saved, fresh, trained))
    trained.go(old, range(40, 47))
    saved.go(ours, range(7))
    for group in ours.param_groups:
        group["lr"] = 0.003
    written(tmp_path, saved, ours, flatten_optimizer_state_dict=flat)
    saved.go(ours, range(7, 14))
    for model, optimizer in ((fresh, new), (trained, old)):
        read(tmp_path, model, optimizer, flatten_optimizer_state_dict=flat)
        assert [group["lr"] for group in optimizer.param_groups] == [0.003] * len(optimizer.param_groups)
        model.go(optimizer, range(7, 14))
        assert same(saved.parameters(), model.parameters())
        assert optimizer.state_bytes() == ours.state_bytes()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("subspace", [*TRAVELLING[:3], {"kind": "svd", "side": "right"}], ids=str)
def test_so_does_one_of_sharded_parameters(tmp_path, mesh, subspace, flat):
    def made():
        model = Model()
        for part in (*model.layers, model.head):
            fully_shard(part, mesh=mesh)
        return model, model.optimizer(subspace)

    (saved, ours), (fresh, new) = made(), made()
    saved.go(ours, range(7))
    moments = [state["exp_avg"] for state in ours.state_dict()["state"].values() if state["exp_avg"].numel()]
    assert moments
    assert all(isinstance(moment, DTensor) for moment in moments)
    written(tmp_path, saved, ours, flatten_optimizer_state_dict=flat)
    read(tmp_path, fresh, new, flatten_optimizer_state_dict=flat)
    assert all(type(v) in (torch.Tensor, int) for state in new.state.values() for v in state.values())
    for model, optimizer in ((saved, ours), (fresh, new)):
        model.go(optimizer, range(7, 14))
    pairs = zip(saved.parameters(), fresh.parameters(), strict=True)
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("subspace", TRAVELLING)
def test_a_state_in_memory_is_put_back_by_torchs_functions(subspace, flat):
    """Other blocks are active when it is put back than when it was taken."""
    model, twin = Model(), Model()
    ours, theirs = model.optimizer(subspace), twin.optimizer(subspace)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model.go(ours, range(3))
    twin.go(theirs, range(3))
    state, weights = copy.deepcopy((get_optimizer_state_dict(model, ours, options=options), model.state_dict()))
    model.go(ours, range(30, 36))
    set_optimizer_state_dict(model, ours, state, options=options)
    model.load_state_dict(weights)
    for each, optimizer in ((model, ours), (twin, theirs)):
        each.go(optimizer, range(3, 12))
    assert same(model.parameters(), twin.parameters())


@TORCHS
def test_a_whole_state_is_loaded_by_torchs_functions(mesh):
    """As `full_state_dict` gathers it, and divides it over processes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    one, other = Model(), Model()
    for part in (*other.layers, other.head):
        fully_shard(part, mesh=mesh)
    ours, theirs = one.optimizer("columns"), other.optimizer("columns")
    one.go(ours, range(5))
    state = get_optimizer_state_dict(one, ours, options=options)
    set_optimizer_state_dict(other, theirs, state, options=options)
    other.load_state_dict({k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in one.state_dict().items()})
    for model, optimizer in ((one, ours), (other, theirs)):
        model.go(optimizer, range(5, 10))
    assert all(torch.equal(a, b.full_tensor()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_state_that_does_not_suit_shards_is_refused_at_loading(mesh):
    def made(subspace, sharded):
        model = Model()
        for part in (*model.layers, model.head) if sharded else ():
            fully_shard(part, mesh=mesh)
        return model, model.optimizer(subspace)

    _, optimizer = made("columns", sharded=True)
    before = snapshot(optimizer)
    for subspace in ("rows", "randk", "svd"):
        model, whole = made(subspace, sharded=False)
        with pytest.raises(ValueError, match=f"is sharded over processes and the subspace is .'kind': '{subspace}'"):
            optimizer.load_state_dict(model.go(whole, range(3)).state_dict())
        assert unchanged(optimizer, before)


@TORCHS
@pytest.mark.parametrize("flat", [False, True])
def test_a_density_of_0_and_parameters_without_state_travel(tmp_path, flat):
    """One group keeps nothing; a parameter is frozen after its optimizer was made, and one is never used."""

    def made():
        model = Model()
        optimizer = model.optimizer("columns", density=0.0)
        model.head.weight.requires_grad_(False)
        return model, optimizer

    def go(model, optimizer, steps):
        for step in steps:
            used = [p for p in model.parameters() if p.requires_grad and p is not model.head.bias]
            stepped(optimizer, [step], used)

    (saved, ours), (fresh, new) = made(), made()
    go(saved, ours, range(3))
    ours.zero_grad()
    written(tmp_path, saved, ours, flatten_optimizer_state_dict=flat)
    read(tmp_path, fresh, new, flatten_optimizer_state_dict=flat)
    for model, optimizer in ((saved, ours), (fresh, new)):
        go(model, optimizer, range(3, 8))
    assert same(saved.parameters(), fresh.parameters())
    assert new.param_groups[0]["steps"] == 8


@TORCHS
def test_a_fresh_optimizers_checkpoint_is_one(tmp_path):
    """Also where gradients are there, so that torch does not initialise the state."""
    model, other = Model(), Model()
    ours, theirs = model.optimizer("columns"), other.optimizer("columns")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    written(tmp_path, model, ours)
    ours.zero_grad()
    read(tmp_path, other, theirs)
    model.go(ours, range(5))
    other.go(theirs, range(5))
    assert same(model.parameters(), other.parameters())


@TORCHS
def test_keys_that_torch_lost_are_not_taken_for_new_moments(tmp_path):
    """torch reads a flat state into the keys that are there: none, where gradients keep it from making them."""
    model, other = Model(), Model()
    state = get_optimizer_state_dict(
        model, model.go(model.optimizer("columns"), range(3)),
        options=StateDictOptions(flatten_optimizer_state_dict=True),
    )  # fmt: skip
    optimizer = other.optimizer("columns")
    for param in other.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"layers.0.0.weight lacks entries.*call prepare_for_load before"):
        set_optimizer_state_dict(other, optimizer, state, options=StateDictOptions(flatten_optimizer_state_dict=True))
    with pytest.raises(ValueError, match="of none of this optimizer's parameters"):
        arranged("ab").prepare_for_load({"optimizer.state.layers.0.0.weight.exp_avg": None})
