"""Intervals that end when the gradient's direction has moved too little: against gradients with a known angle."""

import math

import pytest
import stepping
import torch
from stepping import events_of, frugal, parameters, saved_and_loaded, stepped
from torch import nn

from adafrugal.optim import Displacement, Frugal, LinearDecay, UpdateInBackward, refresh
from adafrugal.optim.choices import POLICIES, SUBSPACES

EVEN = (torch.arange(4)[:, None] + torch.arange(4)).remainder(2).float()  # half of each row and of each column
EXACT = ("blocks", "columns", "rows", "slab", "randperm", "svd")  # their parts of EVEN and of the rest are as large


def turned(angle):
    """A gradient whose part in a subspace is turned by an angle, too."""
    return math.cos(angle) * EVEN + math.sin(angle) * (1 - EVEN)


def run(optimizer, angles):
    """Step with gradients of these angles, one for each matrix; return the steps of the refreshes."""
    events = events_of(optimizer)
    for each in angles:
        for param, angle in zip(parameters(optimizer), each, strict=True):
            param.grad = angle if isinstance(angle, torch.Tensor) else turned(angle)
        optimizer.step()
    return [step for event, step in events if event == "refresh"]


def until_it_stands(k):
    return 0.2 * min(k - 1, 5)


CHECKS = Displacement(threshold=0.1, check=2, min=4, max=100)


@pytest.mark.parametrize("subspace", EXACT)
def test_a_subspace_is_left_when_the_direction_has_moved_too_little_for_its_steps(subspace):
    """2·sin(0.5) after step 5: 0.12 a step at step 8, 0.096 at step 10; then nothing, found at the first check."""
    optimizer = frugal(stepping.matrices([(4, 4)] * 2), subspace=subspace, density=0.5, interval=CHECKS)
    if subspace == "blocks":
        optimizer.param_groups[0]["density"] = 1.0
    assert run(optimizer, [[until_it_stands(k)] * 2 for k in range(1, 21)]) == [1, 11, 15, 19]


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25])
def test_the_size_of_gradients_has_no_effect(scale):
    optimizer = frugal(stepping.matrices([(4, 4)]), subspace="columns", density=0.5, interval=CHECKS)
    assert run(optimizer, [[scale * turned(until_it_stands(k))] for k in range(1, 21)]) == [1, 11, 15, 19]


def test_noise_lasts_for_its_distance_over_the_threshold():
    optimizer = frugal(stepping.matrices([(40, 40)]), subspace="random", interval=Displacement(0.1, 1, 2, 100))
    events = events_of(stepped(optimizer, range(1)))
    stepped(optimizer, range(1, 31))
    assert [step for _, step in events] == [16, 31], "√2 ÷ 0.1 is 14.1"


def test_it_is_the_mean_over_matrices_and_ends_at_the_longest():
    """One of two moves: 0.07 a step at step 4; of a gradient that is zero or not finite there is no direction."""
    still = [[until_it_stands(k), 0.3] for k in range(1, 10)]
    for second in (None, torch.zeros(4, 4), torch.full((4, 4), math.nan)):
        optimizer = frugal(stepping.matrices([(4, 4)] * 2), subspace="columns", density=0.5, interval=CHECKS)
        angles = [[a, b if second is None else second] for a, b in still]
        assert run(optimizer, [*angles, [1.0, 0.3], [1.0, 0.3]]) == ([1, 5, 9] if second is None else [1, 11])
    shortened = Displacement(threshold=0.01, check=3, min=4, max=9)
    optimizer = frugal(stepping.matrices([(4, 4)]), subspace="columns", density=0.5, interval=shortened)
    assert run(optimizer, [[0.4 * k] for k in range(20)]) == [1, 10, 19]
    nothing = frugal(stepping.matrices([(4, 4)]), subspace="columns", density=0.5, interval=shortened)
    assert run(nothing, [[torch.zeros(4, 4)]] * 20) == [1, 10, 19]


@pytest.mark.parametrize("subspace", ["random", "randk"])
def test_it_is_measured_within_the_subspace(subspace):
    optimizer = frugal(stepping.matrices([(6, 9)]), subspace=subspace, interval=Displacement(1e-9, 5, 5, 100))
    optimizer.param_groups[0]["lr"], found = 0.0, []
    optimizer.param_groups[0]["interval"].decide = lambda moved: found.append(moved)
    (param,), kept = parameters(optimizer), []
    for step in range(5):
        stepped(optimizer, [step])
        state = optimizer.state[param]
        inside = state["basis"].T @ param.grad if subspace == "random" else param.grad.take(state["indices"].long())
        kept.append(inside / inside.norm())
    assert found == [pytest.approx(float((kept[-1] - kept[0]).norm()), rel=5e-3)], "the first is kept in bfloat16"


@pytest.mark.parametrize(
    ("subspace", "on_refresh"), [(kind, policy) for kind in SUBSPACES for policy in POLICIES[kind]]
)
def test_what_is_kept_follows_the_selection_and_is_counted(subspace, on_refresh):
    how = {"density": LinearDecay(0.8, 0.2, 12), "interval": Displacement(0.2, 2, 3, 9), "on_refresh": on_refresh}
    optimizer = frugal(stepping.matrices([(20, 16)] * 6), subspace=subspace, **how)
    events = events_of(optimizer)
    for step in range(16):
        stepped(optimizer, [step])
        kept = optimizer.state_bytes().by_role()
        assert kept["gradients"] == 2 * optimizer.selected_entries() == kept["moments"] / 4
    assert {event for event, _ in events} == {"refresh", "shrink"} and len(events) > 4


@pytest.mark.parametrize("subspace", ["columns", "svd"])
def test_training_goes_on_from_any_step_of_a_period(subspace):
    def made():
        how = {"density": LinearDecay(0.5, 0.3, 20), "interval": Displacement(0.2, 2, 4, 30), "stagger": 2}
        return frugal(stepping.matrices([(8, 6)] * 3), subspace=subspace, **how)

    whole = stepped(made(), range(22))
    for stop in (1, 3, 4, 7, 9):
        stopped, resumed = stepped(made(), range(stop)), made()
        resumed.load_state_dict(saved_and_loaded(stopped))
        for param, reached in zip(parameters(resumed), parameters(stopped), strict=True):
            param.data.copy_(reached)
        stepped(resumed, range(stop, 22))
        assert stepping.same(parameters(resumed), parameters(whole)), stop
        assert resumed.checksum() == whole.checksum()
    assert whole.param_groups[0]["refreshes"] > 2


def test_in_the_backward_pass_it_is_the_same():
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
        groups = [{"params": list(model.parameters()), "split": True}]
        optimizer = Frugal(groups, lr=0.01, subspace="columns", interval=Displacement(0.2, 2, 4, 30))
        events = events_of(optimizer)
        if in_backward:
            UpdateInBackward(optimizer)
        for step in range(30):
            model(torch.randn(16, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((events, [param.tolist() for param in model.parameters()]))
    assert found[0] == found[1] and len(found[0][0]) > 3


def test_numbers_are_read_at_checks_alone_and_a_graph_is_not_replayed_over_one():
    """On the meta device no number can be read."""
    params = stepping.matrices([(8, 6)] * 2, device="meta")
    optimizer = frugal(params, subspace="columns", interval=Displacement(0.1, 2, 4, 30))
    for _ in range(3):
        assert not optimizer.param_groups[0]["refreshes"] or not refresh.moves_next(
            optimizer.param_groups[0], optimizer.state
        )
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert refresh.moves_next(optimizer.param_groups[0], optimizer.state)
    with pytest.raises(NotImplementedError, match="meta"):
        optimizer.step()


def test_an_interval_may_become_one_later():
    optimizer = stepped(frugal(stepping.matrices([(8, 6)]), subspace="columns", interval=50), range(2))
    optimizer.param_groups[0]["interval"] = {"kind": "displacement", "min": 4, "check": 2, "threshold": 0.3}
    events = events_of(optimizer)
    stepped(optimizer, range(2, 9))
    assert [step for _, step in events] == [7], "√2 ÷ 0.3 is 4.7, and the checks are at 4 and 6"
    optimizer.param_groups[0]["interval"] = 2
    stepped(optimizer, range(9, 12))
    assert "gradients" not in optimizer.state_bytes().by_role()
