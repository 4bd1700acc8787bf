"""Refresh or shrink a group's subspace, and keep, cut or reset the moments.

Functions on one split parameter group and the optimizer's state. A period lasts from one refresh to the next; its
selections are made at once, or spread over `stagger` steps. If a subspace needs gradients, a matrix whose gradient is
missing or not finite waits, and keeps its old subspace.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from adafrugal.optim import controls, rules, storage
from adafrugal.optim.options import Clocks, Group, parameter_names
from adafrugal.optim.sharding import owners, shards
from adafrugal.optim.state import complete, first_gradient, forget_moments, has_moments, moment_names, selection
from adafrugal.optim.subspaces import Matrix, Period, Selection

States: TypeAlias = Mapping[Tensor, dict[str, Any]]
Event = Literal["refresh", "continued", "shrink"]


@dataclass(frozen=True)
class Refresh:
    """A new selection of the subspace, or its shrinking between two refreshes.

    Args:
        event: "refresh"; "continued" if matrices select at a later step than others of their period (`stagger`, or
            late gradients); "shrink" if ρ fell between refreshes and part of the subspace was released.
        step: the optimizer step at which it happened; the first is 1.
        group: the index of the parameter group.
        density: ρ as read at this step.
        interval: T as read at this step.
        seconds: host time of the selection, without pending work of a GPU.
        bytes_before: all of the optimizer's state before the step.
        bytes_after: the same after the step.
    """

    event: Event
    step: int
    group: int
    density: float
    interval: int
    seconds: float
    bytes_before: int
    bytes_after: int


# -- selections -------------------------------------------------------------------------------------------------------


def selection_here(param: Tensor, state: Mapping[str, Any], group: Group) -> Selection:
    """Return the selection within this process's rows."""
    return _seen_here(param, selection(state, group), group)


def _seen_here(param: Tensor, chosen: Selection, group: Group) -> Selection:
    return group["subspace"].within(chosen, shards.here(param)) if chosen and shards.is_sharded(param) else chosen


def outline(group: Group, states: States) -> Iterator[Any]:
    """Yield the values that must agree on all processes: ρ, T, the clocks, and each matrix's selection."""
    yield group["density_read"], group["interval"].at(group["steps"])
    counts: Mapping[str, Any] = group
    yield [counts[name] for name in ("steps", "skipped_steps", *Clocks.__annotations__) if name != "density_read"]
    for param in group["params"]:
        state = states.get(param, {})
        yield state.get("entries", 0), state.get("turn", 0)
        for value in selection(state, group).values():
            if isinstance(value, Tensor):
                yield list(value.shape)
                yield value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            else:
                yield value


# -- when to select ---------------------------------------------------------------------------------------------------


def advance(group: Group, states: States) -> list[tuple[Event, list[int]]]:
    """Advance a group's clock by one step, and read ρ if it applies now; return events with indices of matrices.

    Gradients decide only which matrices select now, since some may still arrive (`arrived`).
    """
    group["since_refresh"] += 1
    if group["refreshes"] == 0 and group["density"] == controls.Constant(0):
        return []  # permanently state-free
    density = float(group["density"].at(group["steps"]))
    if not 0 <= density <= 1:
        raise ValueError(f"the density is {density} at step {group['steps']}; it is a share of the entries, 0 to 1")
    if group["refreshes"] == 0 or group["since_refresh"] > group["interval"].at(group["steps"]):
        active = [bool(states.get(param, {}).get("entries")) for param in group["params"]]
        group["handed_out"] += group["subspace"].handed_out(_matrices(group), active)
        group["refreshes"] += 1
        group |= {"density_read": _trained(group, density), "since_refresh": 1}
        group["waiting"] = list(range(len(group["params"])))
        return [("refresh", _choosing(group))]
    places: list[int] = []
    if group["shrink"] == "immediately" and density < group["density_read"] * (1 - group["subspace"].grain):
        _, entries = _amounts(group, density)
        if any(entries) or not _trains_only_the_subspace(group):
            group["density_read"] = density
            places = [i for i, param in enumerate(group["params"]) if entries[i] < states[param].get("entries", 0)]
    shrunk: list[tuple[Event, list[int]]] = [("shrink", places)] if places else []
    return shrunk + arrived(group)


def moves_next(group: Group, states: States) -> bool:
    """Return whether a step would select or shrink, or matrices wait for gradients to select by."""
    trial = group | {"steps": group["steps"] + 1}  # `advance` assigns values, and changes none in place
    decides = group["interval"].decides_at(group["since_refresh"] + 1)
    return bool(group["waiting"] or decides or advance(trial, states) or trial["waiting"])


def arrived(group: Group) -> list[tuple[Event, list[int]]]:
    """Return the event of waiting matrices that can select now; it may occur within a step."""
    event: Event = "refresh" if group["since_refresh"] == 1 else "continued"
    return [(event, places)] if (places := _choosing(group)) else []


def _choosing(group: Group) -> list[int]:
    """Return the indices of the waiting matrices that select now."""
    params = group["params"]
    spread = min(group["stagger"], group["interval"].at(group["steps"])) if group["refreshes"] > 1 else 1
    places = [i for i in group["waiting"] if i * spread // len(params) < group["since_refresh"]]
    if not group["subspace"].needs_gradient:
        return places
    places = [i for i in places if params[i].grad is not None]
    finite = [bool(torch.isfinite(shards.local_grad(params[i])).all()) for i in places]
    finite = shards.agreed(finite, [params[i] for i in places])
    if not all(finite) and not group["bases_kept"]:
        what = "a gradient is not finite: its matrix keeps its basis, and tries again at the next step"
        warnings.warn(what, stacklevel=2)
    group["bases_kept"] += finite.count(False)
    return [i for i, is_finite in zip(places, finite, strict=True) if is_finite]


def clocks(group: Group) -> Group:
    """Return a group's counts, for `take_back`."""
    counts: Mapping[str, Any] = group
    return cast(Group, {name: counts[name] for name in ("steps", *Clocks.__annotations__) if name in group})


def take_back(group: Group, before: Group, has_begun: bool) -> None:
    """Set the clocks back, after a step that failed before its updates; matrices that have selected do not again.

    If a refresh has begun, it goes on at the next step, with the matrices that still wait.
    """
    if has_begun:
        group |= {"steps": before["steps"], "since_refresh": 0}
        return
    if "waiting" in before:
        before["waiting"] = [place for place in before["waiting"] if place in group["waiting"]]
    group |= before


# -- whether anything is trained --------------------------------------------------------------------------------------


def _trains_only_the_subspace(group: Group) -> bool:
    return group["state_free"].sees == "nothing"


def _trained(group: Group, density: float) -> float:
    """Return the density for a refresh: `density`, or one that selects one unit where nothing would be trained.

    Raises:
        ValueError: that is so at the first refresh.
    """
    _, entries = _amounts(group, density)
    if any(entries):
        return density
    nothing = f"selects nothing of {len(entries)} parameters ({group['subspace'].kind})"
    if group["refreshes"] == 1:
        scaled = "" if group["density_scale"] == 1 else f" × {group['density_scale']}"
        what = f"a density of {density}{scaled} {nothing}: raise it, or choose another subspace"
        if _trains_only_the_subspace(group):
            raise ValueError(f"{what}; with state_free='none' nothing of them would be trained")
        if density:
            warnings.warn(what, stacklevel=2)
    elif _trains_only_the_subspace(group):
        what = f"the density has fallen so far that it {nothing}"
        warnings.warn(f"{what}: with state_free='none' it is held where it selects one unit", stacklevel=2)
        return _least(group, density)
    return density


def _least(group: Group, density: float) -> float:
    """Return about the least density that selects an entry, by bisection above one that selects none."""
    low, high = density, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if any(_amounts(group, middle)[1]) else (middle, high)
    return high


# -- new selections and their moments ---------------------------------------------------------------------------------


def refresh(group: Group, places: list[int], states: States) -> None:
    """Select new subspaces of some matrices; free their old state before allocating new state.

    If it fails, matrices without a new selection go on waiting, and are state-free if the old one is gone.
    """
    params, number = group["params"], group["refreshes"]
    try:
        _refresh(group, places, states)
    finally:
        for place in places:
            state = states[params[place]]
            if state.get("turn") != number and not all(name in state for name in group["subspace"].remembers):
                state.clear()
            complete(state, params[place], group)
        group["waiting"] = [place for place in group["waiting"] if states[params[place]].get("turn") != number]


def _refresh(group: Group, places: list[int], states: States) -> None:
    params, subspace, period = group["params"], group["subspace"], _period(group, group["refreshes"])
    shares, entries = _amounts(group, group["density_read"])
    for place in places:
        state = states[params[place]]
        if not entries[place] or period.number == 1:  # before the first, a state holds what a checkpoint is read into
            state.clear()
        if not entries[place]:
            state |= {"entries": 0, "turn": period.number}
        elif group["on_refresh"] in ("reset", "reset_all"):
            tensors = {name for name, value in state.items() if isinstance(value, Tensor)}
            for name in tensors - set(subspace.starts_from):
                del state[name]  # numbers of the old selection stay: the next one may continue from them
        state.pop("first_grad", None)
    live = [place for place in places if entries[place]]
    for numbers in owners.rounds([params[place] for place in live], subspace):
        some = [live[number] for number in numbers]
        asks = [
            owners.Ask(
                params[i], shares[i], period.generator(i), _let_go(states[params[i]], group),
                place=sum(param.shape == params[i].shape for param in params[:i]),
            )
            for i in some
        ]  # fmt: skip
        for i, ask, new in zip(some, asks, owners.select(asks, subspace, group["first"] + some[0]), strict=True):
            state = states[ask.param]
            with _cut_or_forgotten(ask.param, state, group):
                state |= {**new, "turn": period.number, "entries": entries[i]}
                if has_moments(state) and group["on_refresh"] == "keep":
                    _keep(ask.param, state, group, ask.old)
                elif has_moments(state) and group["on_refresh"] == "keep_overlap":
                    _keep_overlap(ask.param, state, group, ask.old)


def _let_go(state: dict[str, Any], group: Group) -> Selection:
    """Return a selection; remove its tensors, and them from the state, unless the new one or the moments need them."""
    needed = group["subspace"].starts_from
    for name, value in selection(state, group).items():
        if isinstance(value, Tensor) and name not in needed and group["on_refresh"] != "keep_overlap":
            del state[name]
    return selection(state, group)


@contextmanager
def _cut_or_forgotten(param: Tensor, state: dict[str, Any], group: Group) -> Iterator[None]:
    """Give float values of the moments to a change of the selection; forget the moments if it fails midway."""
    try:
        with storage.decoded(state, group):
            yield
    except BaseException:
        forget_moments(state, param, group)
        raise


def _keep(param: Tensor, state: dict[str, Any], group: Group, old: Selection) -> None:
    """Keep moments in order: cut them if there are fewer entries, reset them if there are more."""
    subspace, names = group["subspace"], _compact_names(state, group)
    if shards.is_sharded(param):  # move moments to the processes that hold their rows now
        before, now = (subspace.row_range(param.shape, chosen) for chosen in (old, selection(state, group)))
        if before.count < now.count:
            return forget_moments(state, param, group)
        for name in names:
            state[name] = shards.moved(state[name], param, shards.parts(before, param), shards.parts(now, param))
    axis = subspace.axis(param.shape)
    count = len(subspace.positions(param.shape, selection_here(param, state, group)))
    for name in names:
        if state[name].shape[axis] < count:
            return forget_moments(state, param, group)
        if state[name].shape[axis] > count:
            state[name] = state[name].narrow(axis, 0, count).clone()
    return None


def _keep_overlap(param: Tensor, state: dict[str, Any], group: Group, old: Selection) -> None:
    """Keep moments and step counts of units that stay selected; reset all others."""
    subspace, both = group["subspace"], (old, selection(state, group))
    if not any(isinstance(value, Tensor) for value in old.values()) and both[0] == both[1]:
        return
    before, now = (subspace.positions(param.shape, chosen) for chosen in both)
    if torch.equal(before, now):
        return
    if not torch.isin(now, before).any():
        forget_moments(state, param, group)
        return
    # kept units: source index among those selected here before, target index among those selected now
    before, now = (subspace.positions(param.shape, _seen_here(param, chosen, group)) for chosen in both)
    targets = torch.isin(now, before).nonzero().squeeze(1)
    sources = torch.searchsorted(before, now[targets])
    axis = subspace.axis(param.shape)
    if state["step"].ndim == 0:  # from now on each unit counts its own steps
        like = state[rules.MOMENTS[group["state_full"]][0]]
        state["step"] = state["step"].to(like.device).expand([n if i == axis else 1 for i, n in enumerate(like.shape)])
    for name in _compact_names(state, group):
        value = state.pop(name)
        shape = [len(now) if i == axis else n for i, n in enumerate(value.shape)]
        kept = value.index_select(axis, sources.to(value.device))
        state[name] = value.new_zeros(shape).index_copy_(axis, targets.to(value.device), kept)


def shrink(group: Group, places: list[int], states: States) -> None:
    """Release entries beyond a lower density; the remaining entries keep their moments."""
    subspace, (shares, entries) = group["subspace"], _amounts(group, group["density_read"])
    for place in places:
        param = group["params"][place]
        state = states[param]
        if not entries[place]:
            state.clear()
            complete(state, param, group)
            continue
        old = selection(state, group)
        generator = _period(group, state["turn"]).generator(place)
        new = subspace.shrink(param.shape, shares[place], generator, old)
        before, now = (_seen_here(param, chosen, group) for chosen in (old, new))
        with _cut_or_forgotten(param, state, group):
            state |= {**new, "entries": entries[place]}
            for name in [*_compact_names(state, group), *first_gradient(state)]:
                state[name] = subspace.narrow(state.pop(name), param.shape, before, now)


def forget_all(group: Group, states: States) -> None:
    """Reset moments and step counts of a group's tensors; keep selections."""
    for param in group["params"]:
        if param in states:
            forget_moments(states[param], param, group)


def _compact_names(state: Mapping[str, Any], group: Group) -> list[str]:
    """Return the names of compact tensors: moments, and step counts if units have their own."""
    moments = moment_names(state, group)
    return [*moments, "step"] if moments and state["step"].ndim else list(moments)


# -- the arguments of a selection -------------------------------------------------------------------------------------


def _period(group: Group, number: int) -> Period:
    return Period(seed=group["seed"], number=number, start=group["handed_out"], first=group["first"])


def _matrices(group: Group) -> list[Matrix]:
    shapes = [param.shape for param in group["params"]]
    layers: Sequence[int | None] = group.get("layers") or [None] * len(shapes)
    return [*map(Matrix._make, zip(parameter_names(group), shapes, layers, strict=True))]


def _amounts(group: Group, density: float) -> tuple[list[float], list[int]]:
    """Return the share and the number of entries that the subspace selects of each matrix in this period."""
    subspace, period = group["subspace"], _period(group, group["refreshes"])
    matrices = _matrices(group)
    shares = subspace.shares(matrices, min(1.0, density * group["density_scale"]), period)
    pairs = [(matrix.shape, share) for matrix, share in zip(matrices, shares, strict=True)]
    entries = {pair: subspace.entries(*pair) if pair[1] else 0 for pair in {*pairs}}  # few differ, and steps are many
    return shares, [entries[pair] for pair in pairs]
