"""When a group's subspace is chosen anew or shrinks, and what then becomes of the moments.

Functions on one split parameter group and the optimizer's state. A turn lasts from one refresh to the next. What a
turn chooses, it chooses at once, or spread over `stagger` steps; a matrix that cannot choose yet (its subspace needs a
gradient, and there is none, or one that is not finite) waits, and keeps what it had.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from adafrugal.optim import controls, rules
from adafrugal.optim.sharding import owners, shards
from adafrugal.optim.subspaces import Matrix, Selection, Turn

Group: TypeAlias = dict[str, Any]
States: TypeAlias = Mapping[Tensor, dict[str, Any]]
Event = Literal["refresh", "continued", "shrink"]


@dataclass(frozen=True)
class Refresh:
    """A new choice of the subspace, or its shrinking between two choices.

    Args:
        event: "refresh"; "continued" where matrices chose later than others of their turn (`stagger`, or gradients
            that came late); or "shrink" where ρ fell between refreshes and part of the subspace was given up.
        step: the optimizer step at which it happened; the first is 1.
        group: the index of the parameter group.
        density, interval: ρ and T as read at this step.
        seconds: host time of the choice itself. Work that a GPU is still doing is not in it.
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


def new_clocks() -> dict[str, Any]:
    """The numbers by which a split group counts, for one that has made no step."""
    return {"since_refresh": 0, "refreshes": 0, "handed_out": 0, "density_read": 0.0, "waiting": [], "bases_kept": 0}


def selection(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """What a matrix's state says of where its subspace lies."""
    return {name: state[name] for name in group["subspace"].remembers if name in state}


def selection_here(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Selection:
    """The same as seen from the rows that this process has; nothing of a tensor that is not split."""
    return _seen(param, selection(state, group), group) if group["split"] else {}


def _seen(param: Tensor, chosen: Selection, group: Mapping[str, Any]) -> Selection:
    return group["subspace"].within(chosen, shards.here(param)) if chosen and shards.is_sharded(param) else chosen


def outline(group: Group, states: States) -> Iterator[Any]:
    """All that processes must agree on, in plain values and bytes: ρ, T, the clocks, and what each matrix selects."""
    yield group["density_read"], group["interval"].at(group["steps"])
    yield [group[name] for name in ("steps", "skipped_steps", *new_clocks()) if name != "density_read"]
    for param in group["params"]:
        state = states.get(param, {})
        yield state.get("entries", 0), state.get("turn", 0)
        for value in selection(state, group).values():
            if isinstance(value, Tensor):
                yield list(value.shape)
                yield value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            else:
                yield value


class Due(NamedTuple):
    """What has to be done at this step, and for which of the group's matrices, by their places."""

    event: Event
    places: list[int]


def advance(group: Group, states: States) -> list[Due]:
    """Move a group's clock by one step and read ρ where it counts now; tell what is due, in order.

    Which gradients are there decides what is chosen and nothing else, since they may still come (`arrived`).
    """
    group["since_refresh"] += 1
    if group["refreshes"] == 0 and group["density"] == controls.Constant(0):
        return []  # permanently state-free
    density = group["density"].at(group["steps"])
    if not 0 <= density <= 1:
        raise ValueError(f"the density is {density} at step {group['steps']}; it is a share of the entries, 0 to 1")
    if group["refreshes"] == 0 or group["since_refresh"] > group["interval"].at(group["steps"]):
        group["density_read"] = density
        _begin_turn(group, states)
        return [Due("refresh", _choosing(group))]
    due = []
    if group["shrink"] == "immediately" and density < group["density_read"] * (1 - group["subspace"].grain):
        group["density_read"] = density
        shares = enumerate(_shares(group))
        if places := [i for i, (p, share) in shares if _entries(p, share, group) < states[p].get("entries", 0)]:
            due.append(Due("shrink", places))
    return due + arrived(group)


def arrived(group: Group) -> list[Due]:
    """What is due for matrices that wait and whose gradients are there now, perhaps since the middle of a step."""
    places = _choosing(group) if group["waiting"] else []
    return [Due("continued", places)] if places else []


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
    spread = min(group["stagger"], group["interval"].at(group["steps"]))
    if group["refreshes"] == 1:  # at first all choose at once
        spread = 1
    come = [i for i in group["waiting"] if i * spread // n < group["since_refresh"]]
    return _with_sound_gradients(come, group) if group["subspace"].needs_gradient else come


def _with_sound_gradients(places: list[int], group: Group) -> list[int]:
    """Those whose gradients are there and finite, on every process that has a part of them."""
    params = {i: group["params"][i] for i in places if group["params"][i].grad is not None}
    finite = [bool(torch.isfinite(shards.local(param.grad)).all()) for param in params.values()]
    finite = shards.agreed(finite, list(params.values()))
    if not all(finite) and not group["bases_kept"]:
        what = "a gradient is not finite: its matrix keeps its basis, and tries again at the next step"
        warnings.warn(what, stacklevel=2)
    group["bases_kept"] += finite.count(False)
    return [i for i, sound in zip(params, finite, strict=True) if sound]


def _choose(places: list[int], group: Group, states: States) -> None:
    """Choose the subspace of some matrices anew. What is let go of all of them is let go before anything is taken."""
    shares, numbers = _shares(group), _numbers(group)
    entries = {place: _entries(*shares[place], group) for place in places}
    for place in places:
        state = states[group["params"][place]]
        if not entries[place]:
            state.clear()
        elif group["on_refresh"] in ("reset", "reset_all"):
            _release(state)
    live = [place for place in places if entries[place]]
    for some in owners.rounds([shares[place][0] for place in live], group["subspace"]):
        _select([live[i] for i in some], shares, numbers, group, states)
    for place in places:
        states[group["params"][place]]["entries"] = entries[place]
    group["waiting"] = [place for place in group["waiting"] if place not in places]
    _say_if_nothing_is_selected(group, states)


def _release(state: dict[str, Any]) -> None:
    """Let go of every tensor; the numbers of the old selection stay, since the next one may go on from them."""
    for name in [name for name, value in state.items() if isinstance(value, Tensor)]:
        del state[name]


def _select(
    places: list[int], shares: list[tuple[Tensor, float]], numbers: list[int], group: Group, states: States
) -> None:
    """Select in matrices that choose at the same time; their moments are treated as on_refresh says."""
    turn = _turn(group)
    olds = [_let_go(states[shares[place][0]], group) for place in places]
    asks = [
        owners.Ask(*shares[place], turn.generator(place), old, numbers[place])
        for place, old in zip(places, olds, strict=True)
    ]
    chosen = owners.select(asks, group["subspace"], first=group["first"] + places[0])
    for ask, new in zip(asks, chosen, strict=True):
        state = states[ask.param]
        state |= {**new, "turn": turn.number}
        if "step" in state and group["on_refresh"] == "keep":
            _keep(ask.param, state, group, ask.old)
        elif "step" in state and group["on_refresh"] == "keep_overlap":
            _keep_overlap(ask.param, state, group, ask.old)


def _let_go(state: dict[str, Any], group: Group) -> Selection:
    """Let go of a selection; what the next one may look at is returned."""
    old = selection(state, group)
    for name in old:
        del state[name]
    if group["on_refresh"] == "keep_overlap":
        return old
    # nothing is compared then, and a basis need not outlast the next one
    return {name: value for name, value in old.items() if not isinstance(value, Tensor)}


def _say_if_nothing_is_selected(group: Group, states: States) -> None:
    if group["refreshes"] > 1 or group["waiting"] or not group["density_read"]:
        return
    if not any(states[param].get("entries") for param in group["params"]):
        what = f"a density of {group['density_read']} selects nothing of {len(group['params'])} parameters"
        what += f" ({group['subspace'].kind}): raise it, or choose another subspace"
        if group["state_free"] == "none":
            raise ValueError(f"{what}; with state_free='none' nothing of them would be trained")
        warnings.warn(what, stacklevel=2)


def _keep(param: Tensor, state: dict[str, Any], group: Group, old: Selection) -> None:
    """Moments stay, entry for entry in order; cut to size where there are fewer entries, begun anew where more."""
    if shards.is_sharded(param) and not _follow(param, state, group, old):
        _forget(state, group)
        return
    axis = group["subspace"].axis(param.shape)
    count = len(group["subspace"].positions(param.shape, selection_here(param, state, group)))
    for name in _remembered(state, group):
        if state[name].shape[axis] < count:
            _forget(state, group)
            return
        if state[name].shape[axis] > count:
            state[name] = state[name].narrow(axis, 0, count).clone()


def _follow(param: Tensor, state: dict[str, Any], group: Group, old: Selection) -> bool:
    """Bring moments to the processes that have their rows now; False where there are more rows than before."""
    before, now = (group["subspace"].run(param.shape, chosen) for chosen in (old, selection(state, group)))
    if before.count < now.count:
        return False
    for name in _remembered(state, group):
        state[name] = shards.moved(state[name], param, shards.parts(before, param), shards.parts(now, param))
    return True


def _keep_overlap(param: Tensor, state: dict[str, Any], group: Group, old: Selection) -> None:
    """Units that stay selected keep moments and step count, all others begin anew."""
    subspace, new = group["subspace"], selection(state, group)
    if not any(isinstance(value, Tensor) for value in new.values()) and old == new:
        return
    before, now = (subspace.positions(param.shape, chosen) for chosen in (old, new))
    if torch.equal(before, now):
        return
    if not torch.isin(now, before).any():
        _forget(state, group)
        return
    before, now = (subspace.positions(param.shape, _seen(param, chosen, group)) for chosen in (old, new))
    places = torch.isin(now, before).nonzero().squeeze(1)
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
            new = subspace.shrink(param.shape, share, _turn(group, state["turn"]).generator(place), old)
            before, now = (_seen(param, chosen, group) for chosen in (old, new))
            for name in _remembered(state, group):
                state[name] = subspace.narrow(state.pop(name), param.shape, before, now)
            state |= new
        else:
            state.clear()
        state["entries"] = entries


def _entries(param: Tensor, share: float, group: Group) -> int:
    return group["subspace"].entries(param.shape, share) if share else 0


def _remembered(state: Mapping[str, Any], group: Group) -> list[str]:
    """The names of the compact tensors: moments, and step counts where units have their own."""
    moments = [name for name in rules.STATE_FULL[group["state_full"]].moments if name in state]
    return moments + (["step"] if "step" in state and state["step"].ndim else [])


def _forget(state: dict[str, Any], group: Group) -> None:
    for name in (*rules.STATE_FULL[group["state_full"]].moments, "step"):
        state.pop(name, None)


# -- what a choice depends on -----------------------------------------------------------------------------------------


def _turn(group: Group, number: int | None = None) -> Turn:
    """The present turn, or the one with a number, in which a matrix that waits has chosen."""
    number = group["refreshes"] if number is None else number
    return Turn(seed=group["seed"], number=number, start=group["handed_out"], first=group["first"])


def _matrices(group: Group) -> list[Matrix]:
    params = group["params"]
    names = group.get("param_names") or [str(group["first"] + i) for i in range(len(params))]
    layers = group.get("layers") or [None] * len(params)
    return [Matrix(name, p.shape, layer) for name, p, layer in zip(names, params, layers, strict=True)]


def _numbers(group: Group) -> list[int]:
    """Which one each matrix is, from 0, of the group's matrices of its shape."""
    seen: Counter[torch.Size] = Counter()
    numbers = []
    for param in group["params"]:
        numbers.append(seen[param.shape])
        seen[param.shape] += 1
    return numbers


def _shares(group: Group) -> list[tuple[Tensor, float]]:
    """Each matrix of a group with the share of it that the subspace selects at the ρ last read."""
    shares = group["subspace"].shares(_matrices(group), group["density_read"], _turn(group))
    return list(zip(group["params"], shares, strict=True))
