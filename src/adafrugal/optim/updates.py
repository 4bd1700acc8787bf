"""The updates of one step, after subspaces are selected, in one of four ways for each tensor.

`in one launch`: on a GPU, all tensors of a group whose selection is along an axis. Elsewhere `together`: tensors that
rules update in place, all of a group in few calls. `alone`: matrices whose subspace works on copies, one after the
other, so that only one matrix is copied at a time. `in fewer bits`: tensors stored in fewer bits than they are updated
in, by copies in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from adafrugal.optim import rounding
from adafrugal.optim.kernels import compiled, lists, tables
from adafrugal.optim.kernels.tables import Member, Part, Table, alike
from adafrugal.optim.options import Group
from adafrugal.optim.refresh import States, selection, selection_here
from adafrugal.optim.rounding import Rounding
from adafrugal.optim.rules import MOMENTS, Free, Full, Rates
from adafrugal.optim.sharding.shards import here, is_sharded, local
from adafrugal.optim.state import begin, has_moments, in_fewer_bits, state_dtype, working_dtype
from adafrugal.optim.subspaces import Selection

_IN_A_SLICE = 2**22  # entries copied at once, to update them in more bits than they are stored in


class Launches(NamedTuple):
    """How to update some tensors of a group until a selection changes."""

    tables: list[Table]
    rest: list[int]  # indices of the tensors that no table takes


Kept: TypeAlias = dict[tuple[int, tuple[int, ...]], Launches]  # (index of the group's first tensor, indices in it) ->


def update(group: Group, states: States, kept: Kept) -> None:
    """Update the tensors of a group that have a gradient; `kept` holds tables from step to step."""
    places = tuple(i for i, param in enumerate(group["params"]) if param.grad is not None)
    full: list[Full] = []
    free: list[Free] = []
    together = not group["split"] or group["subspace"].in_place
    for place in _update_in_one_launch(group, states, kept, places):
        param = group["params"][place]
        state, target, grad = states[param], local(param), local(param.grad)
        chosen = selection_here(param, state, group)
        if in_fewer_bits(target, group, state):
            number = group["first"] + place
            rounding = Rounding(group["stochastic_rounding"], _key(group), number, _first(param, state, group))
            _update_in_fewer_bits(target, grad, state, group, chosen, rounding)
        elif not together and state.get("entries"):
            _update_alone(target, grad, state, group, chosen)
        else:
            more_full, more_free = _regions(target, grad, state, group, chosen)
            full += more_full
            free += more_free
    _apply_rules(group, full, free)


def begin_moments(group: Group, states: States) -> None:
    """Initialise the moments that a step would initialise, without the step."""
    for param in group["params"]:
        state = states[param]
        if param.grad is not None and has_moments(state, group) and "step" not in state:
            _regions(local(param), local(param.grad), state, group, selection_here(param, state, group))
            for name in MOMENTS[group["state_full"]]:
                state[name] = state[name].to(state_dtype(param, group))


def _regions(
    target: Tensor, grad: Tensor, state: dict[str, Any], group: Group, chosen: Selection
) -> tuple[list[Full], tuple[Free, ...]]:
    """Return a tensor's updates by the state-full rule, with its moments, and by the state-free rule."""
    if not group["split"]:
        begin(state, grad, group)
        return [Full(target, grad, state)], ()
    if not state.get("entries"):
        return [], (Free(target, grad),)
    residual = group["state_free"] != "none"
    regions = group["subspace"].regions(target, grad, chosen, residual)
    begin(state, regions.full[1], group)
    return [Full(*regions.full, state)], regions.free


def _apply_rules(group: Group, full: list[Full], free: list[Free] | tuple[Free, ...]) -> None:
    if not full and not free:
        return
    rates, rates_free = _rates(group)
    lists.state_full(group["state_full"], full, rates, fused=group["fused"])
    if group["split"]:
        lists.state_free(group["state_free"], free, rates_free, compiled=compiled.compiles(group))


def _rates(group: Group) -> tuple[Rates, Rates]:
    """Return the rates of the state-full and of the state-free rule."""
    lr, scale, free_scale = float(group["lr"]), 1.0, 1.0
    if group["split"]:
        scale, free_scale = group["split_lr_scale"], group["state_free_lr_scale"]
    decay = lr * group["weight_decay"]
    rates = Rates(lr * scale, decay, tuple(group["betas"]), group["eps"])
    return rates, Rates(lr * scale * free_scale, decay)


def _key(group: Group) -> int:
    return rounding.key(group["seed"], group["steps"]) if group["stochastic_rounding"] else 0


def _first(param: Tensor, state: dict[str, Any], group: Group) -> tuple[int, int]:
    """Return the indices of this process's first entry within the whole parameter, and within its whole moments."""
    if not is_sharded(param):
        return 0, 0
    before, length = here(param).first, math.prod(param.shape[1:])
    chosen = selection(state, group) if group["split"] else {}
    if not chosen:
        return before * length, before * length
    compact, rows = group["subspace"].compact(param.shape, chosen), group["subspace"].row_range(param.shape, chosen)
    return before * length, max(0, before - rows.first) * math.prod(compact[1:])


# -- in one launch ----------------------------------------------------------------------------------------------------


def _update_in_one_launch(group: Group, states: States, kept: Kept, places: tuple[int, ...]) -> Sequence[int]:
    """Update the tensors at these places that a launch can take; return the other places."""
    if not places or not group["fused"] or not tables.work_on(local(group["params"][places[0]]).device):
        return places
    launches = kept.get((group["first"], places))
    if launches is None or not all(table.is_current() for table in launches.tables):
        for other in [key for key in kept if key[0] == group["first"] and not set(key[1]).isdisjoint(places)]:
            del kept[other]  # a tensor's step count lies in one table
        launches = kept[group["first"], places] = _launches(group, states, places)
    for table in launches.tables:
        table.launch(*_rates(group), _key(group))
    return launches.rest


def _launches(group: Group, states: States, places: Sequence[int]) -> Launches:
    rule, rule_free = group["state_full"], group["state_free"] if group["split"] else "none"
    found = {place: _member(group, states, place) for place in places}
    members = [member for member in found.values() if member is not None]
    made = [Table(some, rule, rule_free, group["stochastic_rounding"]) for some in alike(members, MOMENTS[rule])]
    return Launches(made, [place for place, member in found.items() if member is None])


def _member(group: Group, states: States, place: int) -> Member | None:
    """Return a tensor and its parts, with moments begun; None if a launch cannot take it."""
    param = group["params"][place]
    state, target, chosen = states[param], local(param), selection_here(param, states[param], group)
    subspace = group["subspace"] if chosen else None
    if not tables.takes(target) or not (subspace is None or subspace.along_axis):
        return None
    first, first_moment = _first(param, state, group)
    parts = [Part("free", 0, target.numel())]
    if has_moments(state, group):
        compact, parts = target, [Part("full", 0, target.numel(), first_moment)]
        own_steps = "step" in state and state["step"].ndim > 0  # a count for each line
        if subspace is not None and subspace.in_place and not own_steps:
            (compact, _), free = subspace.regions(target, target, chosen)
            parts = [Part("full", _begin(compact, target), compact.numel(), first_moment)]
            parts += [Part("free", _begin(some, target), some.numel()) for some, *_ in free]
        elif subspace is not None:
            axis, selected = subspace.axis(target.shape), subspace.positions(target.shape, chosen)
            compact = target.narrow(axis, 0, len(selected))
            slots = torch.full((target.shape[axis],), -1, dtype=torch.int32, device=target.device)
            slots.scatter_(0, selected, torch.arange(len(selected), dtype=torch.int32, device=target.device))
            parts = [Part("columns" if axis else "rows", 0, target.numel(), first_moment, slots)]
        begin(state, compact, group, state_dtype(target, group))
        if not all(state[name].is_contiguous() for name in (*MOMENTS[group["state_full"]], "step")):
            return None
    return Member(param, state if has_moments(state, group) else None, parts, group["first"] + place, first)


def _begin(part: Tensor, whole: Tensor) -> int:
    return part.storage_offset() - whole.storage_offset()


# -- one after the other ----------------------------------------------------------------------------------------------


def _update_alone(target: Tensor, grad: Tensor, state: dict[str, Any], group: Group, chosen: Selection) -> None:
    full, free = _regions(target, grad, state, group, chosen)
    _apply_rules(group, full, free)
    if full and group["split"]:
        group["subspace"].close(target, full[0].target, chosen)


def _update_in_fewer_bits(
    target: Tensor, grad: Tensor, state: dict[str, Any], group: Group, chosen: Selection, rounding: Rounding
) -> None:
    if chosen:
        _update_copy(target, grad, state, group, chosen, rounding)
        return
    keeps = has_moments(state, group)
    if keeps:
        begin(state, target, group, state_dtype(target, group))
    moments = [name for name in MOMENTS[group["state_full"]] if name in state]
    for rows in _slices(target):  # updates are elementwise: slices need less memory
        part = {**state, **{name: state[name][rows] for name in moments}}
        if keeps:
            part["step"] = state["step"].clone()
        before = rows.start * math.prod(target.shape[1:]) if rows is not ... else 0
        _update_copy(target[rows], grad[rows], part, group, chosen, rounding.after(before))
    if keeps:
        state["step"] = part["step"]


def _update_copy(
    target: Tensor, grad: Tensor, state: dict[str, Any], group: Group, chosen: Selection, rounding: Rounding
) -> None:
    """Update copies of a tensor and its moments in the working dtype; store the results."""
    dtype, stored_dtype = working_dtype(target), state_dtype(target, group)
    moments = MOMENTS[group["state_full"]]
    stored = {name: state[name] for name in moments if name in state}
    state |= {name: value.to(dtype) for name, value in stored.items()}
    wide = target.to(dtype, copy=True)
    _update_alone(wide, grad.to(dtype), state, group, chosen)
    rounding.store(target, wide, 0)
    for role, name in enumerate(moments, 1) if stored_dtype != dtype and moments[0] in state else ():
        result = state[name]
        state[name] = stored.get(name, torch.empty_like(result, dtype=stored_dtype))
        rounding.store(state[name], result, role)


def _slices(tensor: Tensor) -> Iterator[Any]:
    """Yield indices that divide a tensor into parts of about `_IN_A_SLICE` entries."""
    if tensor.numel() <= _IN_A_SLICE:
        yield ...
        return
    rows = max(1, _IN_A_SLICE * len(tensor) // tensor.numel())
    for first in range(0, len(tensor), rows):
        yield slice(first, first + rows)
