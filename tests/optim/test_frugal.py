import copy
import io

import pytest
import torch
from torch import nn

from adafrugal.optim import Frugal, LinearDecay, LossAware, split_parameters
from adafrugal.optim.choices import POLICIES
from adafrugal.optim.controls import Control
from adafrugal.optim.subspaces import SUBSPACES

SHAPES = [(6, 10), (10, 6), (5, 5), (1, 7), (8, 3), (4, 4), (3, 9), (9, 2)]


def matrices(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def run(optimizer, params, steps):
    for step in steps:
        for p, g in zip(params, gradients(step, params[0].dtype), strict=True):
            p.grad = g
        optimizer.step()


def split(params, **more):
    return [{"params": params, "split": True, **more}]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- the two ends of the density ----------------------------------------------------------------------------------


EVERY = [*SUBSPACES, {"kind": "blocks", "order": "random", "match": "elements"}]
WHOLE = ["blocks", "columns", "rows", "slab", "randk", "randperm"]  # at ρ = 1 these select every entry as it is
PLAIN = {"fused": False, "compile": False}


@pytest.mark.parametrize("form", [PLAIN, {}])
@pytest.mark.parametrize("subspace", WHOLE)
def test_density_1_without_a_refresh_is_torchs_adamw_in_the_plain_form_bit_for_bit(subspace, form):
    ours, theirs = matrices(), matrices()
    rates = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    run(Frugal(split(ours), **rates, density=1.0, interval=10**6, subspace=subspace, **form), ours, range(30))
    run(torch.optim.AdamW(theirs, **rates, foreach=False), theirs, range(30))
    torch.testing.assert_close(ours, theirs, **dict.fromkeys(("rtol", "atol"), 0.0 if form else 1e-6))


@pytest.mark.parametrize("subspace", WHOLE)
def test_density_1_with_moments_kept_is_adamw_through_refreshes_too(subspace):
    ours, theirs = matrices(), matrices()
    policy = "keep_overlap" if subspace == "blocks" else "keep"
    run(Frugal(split(ours), density=1.0, interval=7, subspace=subspace, on_refresh=policy, **PLAIN), ours, range(60))
    run(torch.optim.AdamW(theirs, weight_decay=0.0, foreach=False), theirs, range(60))
    assert same(ours, theirs)


@pytest.mark.parametrize("subspace", EVERY)
def test_density_0_is_signsgd_and_keeps_nothing(subspace):
    ours, theirs = matrices(), matrices()
    optimizer = Frugal(split(ours), lr=0.01, density=0.0, interval=7, subspace=subspace, weight_decay=0.2)
    run(optimizer, ours, range(30))
    for step in range(30):
        for p, g in zip(theirs, gradients(step), strict=True):
            p.data = p.data * (1 - 0.01 * 0.2)
            p.data -= 0.01 * g.sign()
    torch.testing.assert_close(ours, theirs)
    assert optimizer.state_bytes().total == 0


def test_other_tensors_are_adamw_whatever_the_density_and_are_never_reset():
    ours = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    theirs = copy.deepcopy(ours)
    optimizer = Frugal([{"params": ours}, *split(matrices())], lr=0.01, density=0.25, interval=2, **PLAIN)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0, foreach=False)
    for step in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    assert same(ours, theirs)


# -- moving ρ and T ----------------------------------------------------------------------------------------------


def test_refreshes_come_at_t_steps_since_the_last_one_with_a_t_that_jumps():
    params = matrices()
    optimizer = Frugal(split(params), interval=LossAware(start=4, max=50, factor=1.5))
    at = []
    optimizer.register_refresh_hook(lambda event: at.append(event.step))
    for step in range(1, 40):
        run(optimizer, params, [step])
        if step in (6, 11, 18):
            optimizer.observe(3.0)
    # T is 4, from step 11 on 6, from step 18 on 9; no multiple of any of them but the steps since the last refresh
    assert at == [1, 5, 9, 15, 24, 33]


def test_columns_differ_between_turns_matrices_and_groups():
    def indices(*groups):
        return [optimizer.state[p]["indices"].tolist() for g in groups for p in g]

    a, b = ([nn.Parameter(torch.randn(4, 64)) for _ in range(2)] for _ in range(2))
    optimizer = Frugal([*split(a), *split(b)], subspace="columns", density=0.25, interval=1)
    seen = []
    for _ in range(2):
        for p in [*a, *b]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += indices(a, b)
    assert len({tuple(i) for i in seen}) == 8


def test_the_clock_counts_steps_and_not_gradients():
    params = matrices()
    optimizer = Frugal(split(params), density=LinearDecay(1.0, 0.0, steps=10), interval=4)
    at = []
    optimizer.register_refresh_hook(lambda event: at.append((event.event, event.step)))
    for _ in range(5):
        optimizer.step()
    assert optimizer.density == 0.5
    assert [step for event, step in at if event == "refresh"] == [1, 5]


def test_each_group_observes_a_loss_once():
    interval = LossAware(start=4, max=50, factor=1.5)
    optimizer = Frugal([*split(matrices()), *split(matrices(), interval=LossAware(10, 99))], interval=interval)
    optimizer.observe(3.0)
    optimizer.observe(3.0)
    assert [group["interval"].at(1) for group in optimizer.param_groups] == [6, 15]
    assert optimizer.interval == 6, "the first group's"
    assert interval.at(1) == 4, "a control that was given is copied"


class Halving(Control):
    """Somebody's own density: it halves with every observation."""

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
    params = matrices()
    optimizer = Frugal(split(params), density=Halving(), subspace="columns", interval=2)
    optimizer.observe(1.0)
    run(optimizer, params, range(2))
    assert optimizer.density == 0.5
    again = Frugal(split(matrices()), density=Halving(), subspace="columns")
    again.load_state_dict(saved_and_loaded(optimizer))
    assert again.param_groups[0]["density"].at(1) == 0.5
    with pytest.raises(ValueError, match="kind is 'halving'"):
        Frugal(split(matrices()), subspace="columns").load_state_dict(optimizer.state_dict())


def test_an_event_tells_what_happened():
    params = matrices()
    optimizer = Frugal(split(params), density=LinearDecay(0.5, 0.1, steps=8), interval=20, subspace="columns")
    events = []
    handle = optimizer.register_refresh_hook(events.append)
    run(optimizer, params, range(6))
    first = events[0]
    assert (first.event, first.step, first.group, first.interval, first.bytes_before) == ("refresh", 1, 0, 20, 0)
    assert first.density == 0.45
    assert 0 < first.seconds < 1
    assert {e.event for e in events[1:]} == {"shrink"}
    assert events[-1].bytes_after == optimizer.state_bytes().total < events[-1].bytes_before
    handle.remove()
    count = len(events)
    run(optimizer, params, range(6, 10))
    assert len(events) == count


# -- gradients ----------------------------------------------------------------------------------------------------


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    params = matrices()
    before = copy.deepcopy(params)
    optimizer = Frugal(split([*params, embedding.weight]), density=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="no sparse gradients"):
        optimizer.step()
    assert same(params, before), "nothing is changed"


def test_random_choices_leave_torchs_generator_alone_and_follow_the_seed():
    def chosen(seed):
        params = matrices()
        optimizer = Frugal(split(params), subspace="columns", density=0.4, interval=2, seed=seed)
        run(optimizer, params, range(5))
        return [optimizer.state[p].get("indices", torch.empty(0)).tolist() for p in params]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = chosen(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert chosen(1) == first
    assert chosen(2) != first


# -- the contract of torch.optim -----------------------------------------------------------------------------------


def saved_and_loaded(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


CASES = [(s, policy, 1) for s in EVERY for policy in POLICIES[s if isinstance(s, str) else "blocks"]]
STAGGERED = [(s, "reset", 3) for s in ("columns", "slab", "randk", "svd", "random")]


@pytest.mark.parametrize(("subspace", "on_refresh", "stagger"), CASES + STAGGERED, ids=str)
@pytest.mark.parametrize("stop", [1, 5, 6, 17])
def test_a_round_trip_in_the_middle_of_everything_continues_bit_for_bit(subspace, on_refresh, stagger, stop):
    def make(params):
        return Frugal(
            split(params), lr=0.01, density=LinearDecay(0.9, 0.1, steps=15), interval=LossAware(5, 40, factor=1.5),
            subspace=subspace, on_refresh=on_refresh, stagger=stagger, seed=3,
        )  # fmt: skip

    params = matrices()
    optimizer = make(params)
    resumed = other = None
    for step in range(1, 30):
        run(optimizer, params, [step])
        if resumed is not None:
            run(other, resumed, [step])
        if step % 6 == 0:
            optimizer.observe(2.0)
            if other is not None:
                other.observe(2.0)
        if step == stop:
            resumed = copy.deepcopy(params)
            other = Frugal(split(resumed), lr=1.0)  # everything else comes from the saved state
            other.load_state_dict(saved_and_loaded(optimizer))
    assert same(params, resumed)
    assert optimizer.state_bytes() == other.state_bytes()


@pytest.mark.filterwarnings("ignore:weights in 16 bits")
def test_loading_keeps_dtypes_and_shares_no_storage():
    params = matrices(torch.bfloat16)
    optimizer = Frugal(split(params), density=0.5, subspace="columns")
    run(optimizer, params, range(3))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    again = Frugal(split(matrices(torch.bfloat16)), subspace="columns")
    given = optimizer.state_dict()
    again.load_state_dict(given)
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state[p].items():
            loaded = again.state[q][key]
            if torch.is_tensor(value):
                assert loaded.dtype == value.dtype
                assert torch.equal(loaded, value)
                assert loaded.data_ptr() != value.data_ptr()
            else:
                assert loaded == value


def test_it_works_with_closures_schedulers_clipping_and_copies():
    params = matrices()
    optimizer = Frugal(split(params), lr=1.0, density=0.25)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(8):
        scheduler.step()
        last = optimizer.step(closure)
    assert last < first
    twin = copy.deepcopy(optimizer)
    own = [p for group in twin.param_groups for p in group["params"]]
    seen = []
    twin.register_refresh_hook(seen.append)
    run(twin, own, range(200))
    run(optimizer, params, range(200))
    assert same(own, params)
    assert len(seen) == 1


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
    def trained(make):
        params = matrices()
        optimizer = make(params)
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])
        rates = []
        for step in range(6):
            run(optimizer, params, [step])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        return params, rates

    ours = trained(lambda params: Frugal(split(params), lr=0.1, density=1.0, **PLAIN))
    theirs = trained(lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.0, foreach=False))
    assert same(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert len(set(ours[1])) > 1


def test_every_scheduler_that_torch_has_is_among_them():
    made_of_others = {"ChainedScheduler", "SequentialLR", "SWALR"}
    known = {n for n in dir(torch.optim.lr_scheduler) if n.endswith(("LR", "Restarts", "Plateau", "Scheduler"))}
    assert known - made_of_others - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


def test_groups_override_every_rate_and_control():
    a, b = matrices(seed=1), matrices(seed=2)
    optimizer = Frugal([*split(a, density=1.0, subspace="columns"), *split(b, interval=3, lr=0.0)], density=0.0)
    run(optimizer, a, range(2))
    before = copy.deepcopy(b)
    run(optimizer, b, range(2))
    assert same(b, before), "rate 0"
    assert optimizer.selected_entries() == sum(p.numel() for p in a)
    assert optimizer.density == 1.0
    added = nn.Parameter(torch.ones(4, 4))
    optimizer.add_param_group({"params": [added], "split": True, "density": 1.0})
    added.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.state[added]["entries"] == 16


def test_a_group_that_cannot_be_is_not_half_added():
    optimizer = Frugal(split(matrices()))
    for wrong in ({"density": 7}, {"subspace": ["blocks"]}, {"lr": -1}, {"nonfinite": "skip"}):
        group = {"params": [nn.Parameter(torch.ones(2, 2))], "split": True, **wrong}
        before = set(group)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert set(group) == before, "it can be corrected and given again"


def test_what_only_split_groups_have_is_refused_elsewhere_and_a_forgotten_split_is_noticed():
    with pytest.raises(ValueError, match="names density but does not say split=True"):
        Frugal([{"params": matrices(), "density": 0.1}])
    with pytest.warns(UserWarning, match="no group says split=True"):
        Frugal(matrices(), density=0.1)


def test_another_optimizers_state_is_refused_and_changes_nothing():
    params = matrices()
    optimizer = Frugal(split(params), subspace="columns")
    run(optimizer, params, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    wider = [nn.Parameter(torch.ones(p.shape[0], 2 * p.shape[1])) for p in params]
    whole, halves = Frugal(split(wider)), Frugal([*split(params[:4]), *split(params[4:])])
    for other in (torch.optim.AdamW(params), whole, halves):
        with pytest.raises(ValueError, match="the saved state is not this optimizer's"):
            optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert str(after) == str(before)


@pytest.mark.filterwarnings("ignore:no group says split")
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_part_of_a_moment_is_refused_and_changes_nothing(subspace):
    params = matrices()
    optimizer = Frugal(split(params), subspace=subspace, density=0.5)
    run(optimizer, params, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    part = next(entry for entry in state["state"].values() if "exp_avg" in entry)
    part["exp_avg"] = part["exp_avg"][..., :-1]
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the saved exp_avg of parameter number \d has shape \[.*its whole has \["):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_checksum_tells_of_choices_and_clocks_and_of_no_weight_or_moment(subspace):
    one, other = matrices(), matrices()
    optimizers = [Frugal(split(params), subspace=subspace, density=0.5, interval=3) for params in (one, other)]
    seen = []
    for step in range(5):
        for optimizer, params in zip(optimizers, (one, other), strict=True):
            run(optimizer, params, [step])
        seen.append(optimizers[0].checksum())
        assert optimizers[1].checksum() == seen[-1]
        with torch.no_grad():
            other[0].add_(1.0)
    assert len(set(seen)) == 5, "each step counts"
    resumed = Frugal(split(matrices()), subspace=subspace, density=0.5, interval=3)
    resumed.load_state_dict(optimizers[0].state_dict())
    assert resumed.checksum() == seen[-1]
    key = {"blocks": "entries", "slab": "start", "svd": "basis", "random": "basis"}.get(subspace, "indices")
    state = next(state for state in resumed.state.values() if state.get("entries"))
    state[key] = state[key] + 1
    assert resumed.checksum() != seen[-1]


def test_hooks_on_loading_have_their_say():
    params = matrices()
    optimizer = Frugal(split(params), density=1.0)
    run(optimizer, params, range(2))
    again = Frugal(split(matrices()))

    def double(_, given):
        state = {k: {**v, "exp_avg": 2 * v["exp_avg"]} for k, v in given["state"].items()}
        return {**given, "state": state}

    again.register_load_state_dict_pre_hook(double)
    again.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert torch.equal(again.state[q]["exp_avg"], 2 * optimizer.state[p]["exp_avg"])


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
        ({"state_free": "sign"}, "state_free is 'sign'; allowed: signsgd, sgd, none"),
        ({"on_refresh": "keep"}, "on_refresh with blocks is 'keep'; allowed: reset, reset_all, keep_overlap"),
        ({"on_refresh": "keep_overlap", "subspace": "svd"}, "on_refresh with svd .*allowed: reset, reset_all, keep$"),
        ({"state_dtype": "float16"}, "state_dtype is 'float16'; allowed: None, float32, bfloat16"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'; allowed: None, error, skip"),
        ({"stagger": 0}, "stagger is 0"),
        ({"stagger": 2}, "stagger is 2; allowed: 1 with blocks, which choose among all matrices at once"),
        ({"stagger": 9, "subspace": "columns", "interval": 5}, r"stagger is 9; allowed: 1 to the interval \(5\)"),
        ({"shrink": "never"}, "allowed: immediately, at_refresh"),
    ],
)
def test_impossible_values_are_refused_when_the_optimizer_is_made(given, says):
    with pytest.raises(ValueError, match=says):
        Frugal(split(matrices()), **given)


def test_a_split_tensor_must_be_a_matrix_and_the_message_names_it():
    with pytest.raises(ValueError, match=r"parameter norm.weight .* shape \(3,\); columns splits only"):
        Frugal([{"params": [("norm.weight", nn.Parameter(torch.ones(3)))], "split": True}], subspace="columns")


def test_in_anybodys_loop_with_the_readmes_lines():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 20))
    model.forward = lambda x: model[2](model[1][1](model[1][0](model[0](x)).relu()))
    optimizer = Frugal(split_parameters(model), lr=1e-2, density=LinearDecay(0.5, 0.1, 100), interval=LossAware(5, 50))
    x = torch.randint(0, 20, (64,))
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x)
        loss.backward()
        optimizer.step()
        optimizer.observe(loss.item())
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("subspace", [kind for kind in SUBSPACES if kind != "svd"])
def test_on_a_gpu_it_does_what_it_does_on_a_cpu(subspace):
    here, there = matrices(), [nn.Parameter(p.detach().cuda()) for p in matrices()]
    decay = LinearDecay(0.8, 0.1, steps=20)
    # not signSGD: at full rank the residual is rounding noise, and its signs are
    first = Frugal(split(here), density=decay, interval=7, subspace=subspace, lr=0.01, state_free="sgd")
    second = Frugal(split(there), density=decay, interval=7, subspace=subspace, lr=0.01, state_free="sgd")
    run(first, here, range(30))
    for step in range(30):
        for p, g in zip(there, gradients(step), strict=True):
            p.grad = g.cuda()
        second.step()
    torch.testing.assert_close([p.detach() for p in here], [p.detach().cpu() for p in there])
    assert first.state_bytes() == second.state_bytes()
