"""The step, the clocks, torch's contract of an optimizer, and what is refused."""

import copy

import pytest
import torch
from stepping import events_of, frugal, matrices, parameters, same, saved_and_loaded, stepped
from torch import nn
from torch._dynamo.utils import counters

from adafrugal.optim import Frugal, LinearDecay, LossAware
from adafrugal.optim.choices import POLICIES
from adafrugal.optim.controls import Control
from adafrugal.optim.subspaces import SUBSPACES

WHOLE = ["blocks", "columns", "rows", "slab", "randk", "randperm"]  # at ρ = 1 these select every entry as it is
PLAIN = {"fused": False, "compile": False}


# -- the two ends of the density --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "interval"), [(PLAIN, 10**6), ({}, 10**6), (PLAIN, 7)])
@pytest.mark.parametrize("subspace", WHOLE)
def test_density_1_is_torchs_adamw_bit_for_bit_in_the_plain_form_also_through_refreshes(subspace, form, interval):
    rates = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    policy = "keep_overlap" if subspace == "blocks" else "keep"
    ours = frugal(matrices(), **rates, density=1.0, interval=interval, subspace=subspace, on_refresh=policy, **form)
    theirs = torch.optim.AdamW(matrices(), **rates, foreach=False)
    pair = [parameters(stepped(optimizer, range(30))) for optimizer in (ours, theirs)]
    torch.testing.assert_close(*pair, **dict.fromkeys(("rtol", "atol"), 0.0 if form else 1e-6))


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_density_0_is_signsgd_and_keeps_nothing(subspace):
    theirs = matrices()
    optimizer = frugal(matrices(), lr=0.01, density=0.0, interval=7, subspace=subspace, weight_decay=0.2)
    for step in range(15):
        stepped(optimizer, [step])
        for ours, p in zip(parameters(optimizer), theirs, strict=True):
            p.data = p.data * (1 - 0.01 * 0.2) - 0.01 * ours.grad.sign()
    torch.testing.assert_close(parameters(optimizer), theirs)
    assert optimizer.state_bytes().total == 0


# -- moving ρ and T ---------------------------------------------------------------------------------------------------


def test_refreshes_come_at_t_steps_since_the_last_one_with_a_t_that_jumps():
    optimizer = frugal(matrices(), interval=LossAware(start=4, max=50, factor=1.5))
    events = events_of(optimizer)
    for step in range(1, 40):
        stepped(optimizer, [step])
        if step in (6, 11, 18):
            optimizer.observe(3.0)
    # T is 4, from step 11 on 6, from step 18 on 9; no multiple of any of them but the steps since the last refresh
    assert events == [("refresh", step) for step in (1, 5, 9, 15, 24, 33)]


def test_columns_differ_between_refreshes_matrices_and_groups_and_follow_the_seed_alone():
    def chosen(**seed):
        groups = [{"params": matrices([(4, 64)] * 2), "split": True} for _ in range(2)]
        optimizer, found = Frugal(groups, subspace="columns", density=0.25, interval=1, **seed), []
        for step in range(2):
            stepped(optimizer, [step])
            found += [tuple(optimizer.state[p]["indices"].tolist()) for p in parameters(optimizer)]
        return found

    state = torch.get_rng_state()
    first = chosen()
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is left alone"
    assert len(set(first)) == 8
    torch.manual_seed(6)
    assert chosen() == first
    assert not set(chosen(seed=1)) & set(first)


def test_the_clock_counts_steps_and_not_gradients():
    optimizer = frugal(matrices(), density=LinearDecay(1.0, 0.0, steps=10), interval=4)
    events = events_of(optimizer)
    for _ in range(5):
        optimizer.step()
    assert optimizer.density == 0.5
    assert [step for event, step in events if event == "refresh"] == [1, 5]


def test_each_group_observes_a_loss_once():
    interval = LossAware(start=4, max=50, factor=1.5)
    groups = [{"params": matrices(), "split": True, **more} for more in ({}, {"interval": LossAware(10, 99)})]
    optimizer = Frugal(groups, interval=interval)
    optimizer.observe(3.0)
    optimizer.observe(3.0)
    assert [group["interval"].at(1) for group in optimizer.param_groups] == [6, 15]
    assert optimizer.interval == 6, "the first group's"
    assert interval.at(1) == 4, "a control that was given is copied"


class Halving(Control):
    """A density of the caller's own: it halves with every observation."""

    kind = "halving"

    def __init__(self, value=1.0):
        self.value = value

    def at(self, step):
        return self.value

    def observe(self, loss):
        self.value /= 2

    def state_dict(self):
        return {"kind": self.kind, "value": self.value}

    @classmethod
    def from_state(cls, state):
        return cls(state["value"])


def test_a_control_of_ones_own_is_observed_saved_and_restored():
    optimizer = frugal(matrices(), density=Halving(), subspace="columns", interval=2)
    optimizer.observe(1.0)
    assert stepped(optimizer, range(2)).density == 0.5
    again = frugal(matrices(), density=Halving(), subspace="columns")
    again.load_state_dict(saved_and_loaded(optimizer))
    assert again.param_groups[0]["density"].at(1) == 0.5
    with pytest.raises(ValueError, match="kind is 'halving'"):
        frugal(matrices(), subspace="columns").load_state_dict(optimizer.state_dict())


def test_an_event_tells_what_happened():
    optimizer = frugal(matrices(), density=LinearDecay(0.5, 0.1, steps=8), interval=20, subspace="columns")
    events = []
    handle = optimizer.register_refresh_hook(events.append)
    stepped(optimizer, range(6))
    first = events[0]
    assert (first.event, first.step, first.group, first.interval, first.bytes_before) == ("refresh", 1, 0, 20, 0)
    assert first.density == 0.45
    assert 0 < first.seconds < 1
    assert {e.event for e in events[1:]} == {"shrink"}
    assert events[-1].bytes_after == optimizer.state_bytes().total < events[-1].bytes_before
    handle.remove()
    count = len(events)
    stepped(optimizer, range(6, 10))
    assert len(events) == count


# -- the contract of torch.optim --------------------------------------------------------------------------------------

CASES = [(kind, policy, 1) for kind in SUBSPACES for policy in POLICIES[kind]]
CASES += [(kind, "reset", 3) for kind in ("columns", "slab", "randk", "svd", "random")]
CASES += [({"kind": "blocks", "order": "random", "match": "elements"}, "reset", 1)]


@pytest.mark.parametrize(("subspace", "on_refresh", "stagger"), CASES, ids=str)
def test_a_round_trip_in_the_middle_of_everything_continues_bit_for_bit(subspace, on_refresh, stagger):
    def go_on(optimizer, steps):
        for step in steps:
            stepped(optimizer, [step])
            if step % 6 == 0:
                optimizer.observe(2.0)
        return optimizer

    optimizer = frugal(
        matrices(), lr=0.01, density=LinearDecay(0.9, 0.1, steps=15), interval=LossAware(5, 40, factor=1.5),
        subspace=subspace, on_refresh=on_refresh, stagger=stagger, seed=3,
    )  # fmt: skip
    saved, at = {}, 0
    for stop in (1, 5, 6, 17):
        go_on(optimizer, range(at + 1, stop + 1))
        saved[stop], at = (copy.deepcopy(parameters(optimizer)), saved_and_loaded(optimizer)), stop
    go_on(optimizer, range(at + 1, 22))
    for stop, (params, state) in saved.items():
        other = frugal(params, lr=1.0)  # everything else comes from the saved state
        other.load_state_dict(state)
        go_on(other, range(stop + 1, 22))
        assert same(parameters(optimizer), params), stop
        assert optimizer.state_bytes() == other.state_bytes()


@pytest.mark.filterwarnings("ignore:weights in 16 bits")
def test_loading_keeps_dtypes_shares_no_storage_and_asks_the_hooks():
    optimizer = stepped(frugal(matrices(dtype=torch.bfloat16), density=0.5, subspace="columns"), range(3))
    assert optimizer.state[parameters(optimizer)[0]]["exp_avg"].dtype == torch.float32
    again = frugal(matrices(dtype=torch.bfloat16), subspace="columns")

    def double(_, given):
        state = {k: v | ({"exp_avg": 2 * v["exp_avg"]} if "exp_avg" in v else {}) for k, v in given["state"].items()}
        return {**given, "state": state}

    again.register_load_state_dict_pre_hook(double)
    state = optimizer.state_dict()
    del state["param_groups"][0]["stagger"]  # as in a state from before a setting existed
    again.load_state_dict(state)
    assert again.param_groups[0]["stagger"] == 1
    for p, q in zip(parameters(optimizer), parameters(again), strict=True):
        for key, value in optimizer.state[p].items():
            loaded = again.state[q][key]
            if torch.is_tensor(value):
                assert loaded.dtype == value.dtype
                assert torch.equal(loaded, 2 * value if key == "exp_avg" else value)
                assert loaded.data_ptr() != value.data_ptr()
            else:
                assert loaded == value


def test_it_works_with_closures_schedulers_and_copies():
    optimizer = frugal(matrices(), lr=1.0, interval=20)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in parameters(optimizer))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(8):
        scheduler.step()
        last = optimizer.step(closure)
    assert last < first
    twin = copy.deepcopy(optimizer)
    events = events_of(twin)
    pair = [parameters(stepped(each, range(20))) for each in (twin, optimizer)]
    assert same(*pair)
    assert events == [("refresh", 21)]


def test_torch_compile_leaves_a_step_as_it_is():
    plain, compiled = (frugal(matrices(), subspace="columns", interval=2) for _ in range(2))
    counters.clear()
    step = torch.compile(compiled.step)
    for number in range(3):
        stepped(plain, [number])
        for one, other in zip(parameters(plain), parameters(compiled), strict=True):
            other.grad = one.grad
        step()
    assert same(parameters(plain), parameters(compiled))
    assert compiled.param_groups[0]["steps"] == 3
    assert not counters["stats"].get("unique_graphs")


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.5},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.5},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": True},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 6, "cycle_momentum": True},
    "ReduceLROnPlateau": {"patience": 0},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_does_to_it_what_it_does_to_adamw(name):
    def trained(optimizer):
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])
        rates = []
        for step in range(6):
            stepped(optimizer, [step])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        return parameters(optimizer), rates

    ours = trained(frugal(matrices(), lr=0.1, density=1.0, **PLAIN))
    theirs = trained(torch.optim.AdamW(matrices(), lr=0.1, weight_decay=0.0, foreach=False))
    assert same(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert len(set(ours[1])) > 1


def test_every_scheduler_that_torch_has_is_among_them():
    made_of_others = {"ChainedScheduler", "SequentialLR", "SWALR"}
    known = {n for n in dir(torch.optim.lr_scheduler) if n.endswith(("LR", "Restarts", "Plateau", "Scheduler"))}
    assert known - made_of_others - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


def test_groups_override_every_rate_and_control_and_can_be_added():
    a, b, added = matrices(), matrices(seed=2), nn.Parameter(torch.ones(4, 4))
    groups = [{"params": a, "density": 1.0, "subspace": "columns"}, {"params": b, "interval": 3, "lr": 0.0}]
    optimizer = stepped(Frugal([{"split": True, **group} for group in groups], density=0.0), range(2))
    assert same(b, matrices(seed=2)), "rate 0"
    assert optimizer.selected_entries() == sum(p.numel() for p in a)
    assert optimizer.density == 1.0
    optimizer.add_param_group({"params": [added], "split": True, "density": 1.0})
    assert stepped(optimizer, [2]).state[added]["entries"] == 16


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_checksum_tells_of_choices_and_clocks_and_of_no_weight_or_moment(subspace):
    one, other, resumed = (frugal(matrices(), subspace=subspace, density=0.5, interval=3) for _ in range(3))
    seen = []
    for step in range(5):
        seen.append(stepped(one, [step]).checksum())
        assert stepped(other, [step]).checksum() == seen[-1]
        with torch.no_grad():
            parameters(other)[0].add_(1.0)
    assert len(set(seen)) == 5, "each step counts"
    resumed.load_state_dict(one.state_dict())
    assert resumed.checksum() == seen[-1]
    key = {"blocks": "entries", "slab": "start", "svd": "basis", "random": "basis"}.get(subspace, "indices")
    state = next(state for state in resumed.state.values() if state.get("entries"))
    state[key] = state[key] + 1
    assert resumed.checksum() != seen[-1]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    params = matrices()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="no sparse gradients"):
        frugal([*params, embedding.weight], density=1.0).step()
    assert same(params, matrices()), "nothing is changed"


def test_a_group_that_cannot_be_is_not_half_added():
    optimizer = frugal(matrices())
    for wrong in ({"density": 7}, {"subspace": ["blocks"]}, {"lr": -1}, {"nonfinite": "skip"}, {"layers": [0, 1]}):
        group = {"params": [nn.Parameter(torch.ones(2, 2))], "split": True, **wrong}
        before = set(group)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert set(group) == before, "it can be corrected and given again"


def test_what_only_split_groups_have_is_refused_elsewhere_and_a_forgotten_split_is_noticed():
    with pytest.raises(ValueError, match="names density but does not say split=True"):
        Frugal([{"params": matrices(), "density": 0.1}])
    with pytest.raises(ValueError, match="no group says split=True, so nothing would be split, as when a trainer"):
        Frugal(matrices(), density=0.1)
    with pytest.raises(ValueError, match="no group says split=True"):  # as transformers.Trainer makes groups
        Frugal([{"params": matrices(), "weight_decay": 0.1}], density=0.1)
    with pytest.warns(UserWarning, match="no group says split=True"):
        Frugal([{"params": matrices(), "split": False}], density=0.1)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(subspace):
    params = matrices()
    optimizer = stepped(frugal(params, subspace=subspace, density=0.5), range(3))
    part = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(part)
    moments = next(entry for entry in part["state"].values() if entry["entries"])
    moments["exp_avg"] = moments["exp_avg"][..., :-1]
    wider = [nn.Parameter(torch.ones(p.shape[0], 2 * p.shape[1])) for p in params]
    halves = Frugal([{"params": half, "split": True} for half in (params[:4], params[4:])])
    others = [other.state_dict() for other in (torch.optim.AdamW(params), frugal(wider), halves)]
    another, shorter = "the saved state is not this optimizer's", r"the saved exp_avg .* has shape \[.*its whole has \["
    before = str(optimizer.state_dict())
    for state, says in ((part, shorter), *((other, another) for other in others)):
        with pytest.raises(ValueError, match=says):
            optimizer.load_state_dict(state)
        assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr": -1.0}, "lr is -1.0; allowed: 0 or more"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"density": 2.0}, "a density is a share"),
        ({"interval": 0}, "at least 1"),
        ({"subspace": "diagonals"}, "allowed: blocks, columns"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"betas": (0.9,)}, "betas is"),
        ({"state_full": "adam"}, "state_full is 'adam'; allowed: adamw, lion, sgdm"),
        ({"state_free": "sign"}, "state_free is 'sign'; allowed: signsgd, sgd, none, whiten"),
        ({"on_refresh": "keep"}, "on_refresh with blocks is 'keep'; allowed: reset, reset_all, keep_overlap"),
        ({"on_refresh": "keep_overlap", "subspace": "svd"}, "on_refresh with svd .*allowed: reset, reset_all, keep$"),
        ({"state_dtype": "float16"}, "state_dtype is 'float16'; allowed: None, float32, bfloat16"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'; allowed: None, error, skip"),
        ({"stagger": 0}, "stagger is 0"),
        ({"stagger": 2}, "stagger is 2; allowed: 1 with blocks, which choose among all matrices at once"),
        ({"stagger": 9, "subspace": "columns", "interval": 5}, r"stagger is 9; allowed: 1 to the interval \(5\)"),
        ({"shrink": "never"}, "allowed: immediately, at_refresh"),
        (
            {"params": [("norm.weight", nn.Parameter(torch.ones(3)))], "subspace": "columns"},
            r"parameter norm.weight .* shape \(3,\); columns splits only",
        ),
    ],
)
def test_impossible_values_are_refused_when_the_optimizer_is_made(given, says):
    with pytest.raises(ValueError, match=says):
        frugal(**{"params": matrices(), **given})


@pytest.mark.gpu
@pytest.mark.parametrize("subspace", [kind for kind in SUBSPACES if kind != "svd"])
def test_on_a_gpu_it_does_what_it_does_on_a_cpu(subspace):
    # not signSGD: at full rank the residual is rounding noise, and its signs are
    how = {"density": LinearDecay(0.8, 0.1, steps=20), "interval": 7, "subspace": subspace, "state_free": "sgd"}
    here, there = (stepped(frugal(matrices(device=d), lr=0.01, **how), range(30)) for d in ("cpu", "cuda"))
    torch.testing.assert_close(*([p.detach().cpu() for p in parameters(each)] for each in (here, there)))
    assert here.state_bytes() == there.state_bytes()
