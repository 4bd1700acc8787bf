"""When a group's subspace is chosen anew or shrinks, and what then becomes of the moments.

Functions on one split parameter group and the optimizer's state. A turn lasts from one refresh to the next. What a
turn chooses, it chooses at once, or spread over `stagger` steps; a matrix that cannot choose yet (its subspace needs a
gradient, and there is none, or one that is not finite) waits, and keeps what it had.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from adafrugal.optim import controls, rules
from adafrugal.optim.subspaces import Matrix, Selection, Turn

Group: TypeAlias = dict[str, Any]
States: TypeAlias = Mapping[Tensor, dict[str, Any]]
Event = Literal["refresh", "continued", "shrink"]


def new_clocks() -> dict[str, Any]:
    """The numbers by which a split group counts, for one that has made no step."""
    return {"since_refresh": 0, "refreshes": 0, "handed_out": 0, "density_read": 0.0, "waiting": [], "bases_kept": 0}


def selection(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """What a matrix's state says of where its subspace lies."""
    return {name: state[name] for name in group["subspace"].remembers if name in state}


class Due(NamedTuple):
    """What has to be done at this step, and for which of the group's matrices, by their places."""

    event: Event
    places: list[int]


def due(group: Group, states: States) -> Due | None:
    """Move a group's clock by one step and read ρ where it counts now; tell what has to follow."""
    group["since_refresh"] += 1
    for name, build in (("density", controls.density), ("interval", controls.interval)):
        if not isinstance(group[name], controls.Control):  # somebody set a number
            group[name] = build(group[name])
    density = group["density"].at(group["steps"])
    if group["refreshes"] == 0 or group["since_refresh"] > group["interval"].at(group["steps"]):
        group["density_read"] = density
        _begin_turn(group, states)
        return Due("refresh", _choosing(group))
    if group["waiting"] and (places := _choosing(group)):
        return Due("continued", places)
    if group["shrink"] == "immediately" and density < group["density_read"] * (1 - group["subspace"].grain):
        group["density_read"] = density
        shares = enumerate(_shares(group))
        if places := [i for i, (p, share) in shares if _entries(p, share, group) < states[p].get("entries", 0)]:
            return Due("shrink", places)
    return None


def carry_out(due: Due, group: Group, states: States) -> None:
    """Do what is due."""
    if due.event == "shrink":
        _shrink(due.places, group, states)
    else:
        _choose(due.places, group, states)


# -- choosing ---------------------------------------------------------------------------------------------------------


def forget_all(group: Group, states: States) -> None:
    """Let moments and step counts of a group's tensors begin anew; what is selected stays."""
    for param in group["params"]:
        if param in states:
            _forget(states[param], group)


def _begin_turn(group: Group, states: States) -> None:
    active = [bool(states[param].get("entries")) for param in group["params"]]
    group["handed_out"] += group["subspace"].handed_out(_matrices(group), active)
    group["refreshes"] += 1
    group["since_refresh"] = 1
    group["waiting"] = list(range(len(group["params"])))


def _choosing(group: Group) -> list[int]:
    """The places of those waiting matrices whose moment has come."""
    n = len(group["params"])
    spread = group["stagger"] if group["refreshes"] > 1 else 1  # at first all choose at once
    come = (i for i in group["waiting"] if i * spread // n < group["since_refresh"])
    return [i for i in come if not group["subspace"].needs_gradient or _has_sound_gradient(group, i)]


def _has_sound_gradient(group: Group, place: int) -> bool:
    grad = group["params"][place].grad
    if grad is None:
        return False
    if bool(torch.isfinite(grad).all()):
        return True
    if not group["bases_kept"]:
        what = "a gradient is not finite: its matrix keeps its basis, and tries again at the next step"
        warnings.warn(what, stacklevel=2)
    group["bases_kept"] += 1
    return False


def _choose(places: list[int], group: Group, states: States) -> None:
    """Choose the subspace of some matrices anew. What old moments are let go is let go before new ones are taken."""
    subspace, turn, shares = group["subspace"], _turn(group), _shares(group)
    old = {place: _outlasts(selection(states[group["params"][place]], group), group) for place in places}
    before = {place: states[group["params"][place]].get("entries", 0) for place in places}
    for place in places:
        if group["on_refresh"] in ("reset", "reset_all"):
            states[group["params"][place]].clear()
    for place in places:
        param, share = shares[place]
        state = states[param]
        entries = _entries(param, share, group)
        if not (entries and before[place]):
            state.clear()
        state["entries"] = entries
        if not entries:
            continue
        new = subspace.select(param, param.grad, share, turn.generator(place), old[place])
        state |= new
        if before[place] and group["on_refresh"] == "keep":
            _keep(param, state, group)
        elif before[place] and group["on_refresh"] == "keep_overlap":
            _keep_overlap(param, state, group, old[place])
    group["waiting"] = [place for place in group["waiting"] if place not in places]


def _outlasts(old: Selection, group: Group) -> Selection:
    """What of an old selection is needed for a new one: where moments are not compared, numbers but no tensors."""
    everything = group["on_refresh"] == "keep_overlap"
    return {name: value for name, value in old.items() if everything or not isinstance(value, Tensor)}


def _keep(param: Tensor, state: dict[str, Any], group: Group) -> None:
    """Moments stay, entry for entry in order; cut to size where there are fewer entries, begun anew where more."""
    axis = group["subspace"].axis(param.shape)
    count = len(group["subspace"].positions(param.shape, selection(state, group)))
    for name in _remembered(state, group):
        if state[name].shape[axis] < count:
            _forget(state, group)
            return
        if state[name].shape[axis] > count:
            state[name] = state[name].narrow(axis, 0, count).clone()


def _keep_overlap(param: Tensor, state: dict[str, Any], group: Group, old: Selection) -> None:
    """Units that stay selected keep moments and step count, all others begin anew."""
    subspace = group["subspace"]
    before, now = (subspace.positions(param.shape, chosen) for chosen in (old, selection(state, group)))
    if "step" not in state or torch.equal(before, now):
        return
    places = torch.isin(now, before).nonzero().squeeze(1)
    if not len(places):
        _forget(state, group)
        return
    axis, sources = subspace.axis(param.shape), torch.searchsorted(before, now[places])
    if state["step"].ndim == 0:  # from here on units count their own steps
        like = state[rules.STATE_FULL[group["state_full"]].moments[0]]
        state["step"] = state["step"].to(like.device).expand([n if i == axis else 1 for i, n in enumerate(like.shape)])
    for name in _remembered(state, group):
        old_values = state.pop(name)
        places, sources = places.to(old_values.device), sources.to(old_values.device)
        state[name] = old_values.new_zeros([len(now) if i == axis else n for i, n in enumerate(old_values.shape)])
        state[name].index_copy_(axis, places, old_values.index_select(axis, sources))


def _shrink(places: list[int], group: Group, states: States) -> None:
    """Give up what a lower density no longer covers; what remains keeps its moments."""
    subspace, shares = group["subspace"], _shares(group)
    for place in places:
        param, share = shares[place]
        state, entries = states[param], _entries(param, share, group)
        if entries:
            old = selection(state, group)
            new = subspace.shrink(param.shape, share, _turn(group, place).generator(place), old)
            for name in _remembered(state, group):
                state[name] = subspace.narrow(state.pop(name), param.shape, old, new)
            state |= new
        else:
            state.clear()
        state["entries"] = entries


def _entries(param: Tensor, share: float, group: Group) -> int:
    return group["subspace"].entries(param.shape, share)


def _remembered(state: Mapping[str, Any], group: Group) -> list[str]:
    """The names of the compact tensors: moments, and step counts where units have their own."""
    moments = [name for name in rules.STATE_FULL[group["state_full"]].moments if name in state]
    return moments + (["step"] if "step" in state and state["step"].ndim else [])


def _forget(state: dict[str, Any], group: Group) -> None:
    for name in (*rules.STATE_FULL[group["state_full"]].moments, "step"):
        state.pop(name, None)


# -- what a choice depends on -----------------------------------------------------------------------------------------


def _turn(group: Group, place: int | None = None) -> Turn:
    """The present turn; for a matrix that still waits, the one before."""
    number = group["refreshes"] - (place in group["waiting"])
    return Turn(seed=group["seed"], number=number, start=group["handed_out"], first=group["first"])


def _matrices(group: Group) -> list[Matrix]:
    params = group["params"]
    names = group.get("param_names") or [str(group["first"] + i) for i in range(len(params))]
    layers = group.get("layers") or [None] * len(params)
    return [Matrix(name, p.shape, layer) for name, p, layer in zip(names, params, layers, strict=True)]


def _shares(group: Group) -> list[tuple[Tensor, float]]:
    """Each matrix of a group with the share of it that the subspace selects at the ρ last read."""
    shares = group["subspace"].shares(_matrices(group), group["density_read"], _turn(group))
    return list(zip(group["params"], shares, strict=True))
