"""The updates of one step, after subspaces are selected, in one of five ways for each tensor.

`in one launch`: on a GPU, all tensors of a group whose selection is along an axis. `in batches`: on a GPU, matrices of
one shape that are projected, or whose state-free rule sees more than entries and takes stacks. Elsewhere `together`:
tensors that rules update in place, all of a group in few calls. `alone`: matrices whose subspace works on copies, or
whose state-free rule sees more than entries, one after the other, so that only one matrix is copied at a time.
`by copies`: tensors that are stored in fewer bits than they are updated in, or whose moments lie elsewhere; on a GPU
only what no launch takes, such as randk, projections, and rules that see more than entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adafrugal.optim import choices, storage
from adafrugal.optim.kernels import compiled, lists, tables
from adafrugal.optim.kernels.tables import Member, Part, Table, alike
from adafrugal.optim.options import Group
from adafrugal.optim.refresh import States, selection_here
from adafrugal.optim.rounding import Rounding, noise_key
from adafrugal.optim.rules import MOMENTS, Free, Full, Rates
from adafrugal.optim.sharding import directions, shards
from adafrugal.optim.sharding.shards import here, is_sharded, local, local_grad
from adafrugal.optim.state import SCALES, has_moments, moment_names, selection
from adafrugal.optim.state_free import SGD
from adafrugal.optim.subspaces import Selection
from adafrugal.optim.subspaces.projections import Projection

_IN_A_BATCH = 2**23  # entries of matrices projected, or given to a rule, at once
_IN_A_SLICE = 2**18  # entries copied at once, to update them in more bits than they are stored in
_SLICES_OF_A_LAUNCH = 16  # on a GPU, where each operation costs a launch


class Launches(NamedTuple):
    """How to update some tensors of a group until a selection changes."""

    tables: list[Table]
    rest: list[int]  # indices of the tensors that no table takes


class Due(NamedTuple):
    """A tensor to update: this process's part of it."""

    place: int  # index among the group's parameters
    target: Tensor
    grad: Tensor  # shape of target
    state: dict[str, Any]
    chosen: Selection


Apply: TypeAlias = Callable[[Sequence[Full], Sequence[Free]], None]
Kept: TypeAlias = dict[tuple[Any, ...], Launches]  # by rules, rounding, and the identities of the tensors


def update(group: Group, places: Sequence[int], states: States, kept: Kept) -> None:
    """Update the tensors of a group at some places, which have gradients; `kept` holds tables from step to step."""
    full: list[Full] = []
    free: list[Free] = []
    together = not group["split"] or group["subspace"].in_place
    batches: dict[tuple[Any, ...], list[Due]] = {}
    rest = _update_in_one_launch(group, states, kept, places)
    if not rest:
        return
    tables.refuse_to_record("some tensors of a group are not updated in one launch")
    apply = _rules_of(group)
    for place in rest:
        param = group["params"][place]
        state, target, grad = states[param], local(param), local_grad(param)
        chosen = selection_here(param, state, group)
        storage.begin(param, state, group, chosen)
        needs_copies = storage.needs_copies(target, state, group)
        if not needs_copies:
            grad = grad.to(target.dtype)  # autograd may keep it in another (`grad_dtype`)
        due = Due(place, target, grad, state, chosen)
        if needs_copies:
            number = group["first"] + place
            rounding = Rounding(group["stochastic_rounding"], _key(group), number, _first(param, state, group))
            _update_copies(due, group, rounding, apply)
        elif (kind := _kind_of_batch(due, group)) is not None:
            batches.setdefault(kind, []).append(due)
        elif _takes_direction(state, group, chosen) or (not together and state.get("entries")):
            _update_in_turn([due], group, apply)
        else:
            more_full, more_free = _regions(due, group)
            full += more_full
            free += more_free
    apply(full, free)
    update_batch = _update_in_turn if group["split"] and not group["state_free"].by_entry else _update_projected
    for batch in batches.values():
        for some in _divided(batch, group):
            update_batch(some, group, apply)


def _kind_of_batch(due: Due, group: Group) -> tuple[Any, ...] | None:
    """Return what matrices of one batch have in common; None if a tensor is not updated in a batch."""
    place, target, _, state, chosen = due
    common = target.device, target.dtype, target.shape
    if _takes_direction(state, group, chosen):
        if directions.are_shared(param := group["params"][place], group["state_free"]):
            return shards.processes(param).group, target.dtype
        return common if group["fused"] and group["state_free"].takes_stacks and _costs_a_launch(target) else None
    if not group["split"] or not group["fused"]:
        return None
    suits = group["subspace"].in_batches and state.get("entries") and group["state_free"].kind in tables.RULES_FREE
    if suits and target.dtype == torch.float32 and tables.takes(target):
        return *common, chosen["basis"].shape
    return None


def _divided(batch: Sequence[Due], group: Group) -> Iterator[Sequence[Due]]:
    """Divide matrices of one kind into batches of as many as are to be updated at once."""
    params = [group["params"][due.place] for due in batch]
    if group["split"] and directions.are_shared(params[0], group["state_free"]):
        for numbers in directions.rounds(params, group["state_free"]):
            yield [batch[i] for i in numbers]
        return
    some = max(1, _IN_A_BATCH // max(1, batch[0].target.numel()))
    for start in range(0, len(batch), some):
        yield batch[start : start + some]


def _costs_a_launch(target: Tensor) -> bool:
    return target.is_cuda


def begin_moments(group: Group, states: States) -> None:
    """Initialise the moments that a step would initialise, without the step."""
    for param in group["params"]:
        if param.grad is not None:
            storage.begin(param, states[param], group, selection_here(param, states[param], group))


def _regions(due: Due, group: Group, direction: Tensor | None = None) -> tuple[list[Full], Sequence[Free]]:
    """Return a tensor's updates by the state-full rule and by the state-free rule, or by the direction it has made."""
    _, target, grad, state, chosen = due
    if not group["split"]:
        return [Full(target, grad, state)], ()
    subspace = group["subspace"]
    if not state.get("entries"):
        return [], (Free(target, grad if direction is None else direction),)
    residual = direction is None and group["state_free"].sees != "nothing"
    regions = subspace.regions(target, grad, chosen, residual=residual)
    free = regions.free if direction is None else subspace.regions(target, direction, chosen).free
    return [Full(*regions.full, state)], free


def _takes_direction(state: Mapping[str, Any], group: Group, chosen: Selection) -> bool:
    """Return whether a rule that sees more than entries updates a tensor, or a part of it: by its whole gradient."""
    if not group["split"] or group["state_free"].by_entry:
        return False
    return bool(chosen) or not state.get("entries")


def _rules_of(group: Group) -> Apply:
    """Return a function that applies a group's rules at this step's rates."""
    rates, rates_free = _rates(group)
    to_compile = group["split"] and compiled.compiles(group)
    rule = group["state_free"] if group["split"] and group["state_free"].by_entry else SGD()  # which adds a direction

    def apply(full: Sequence[Full], free: Sequence[Free]) -> None:
        if full:
            lists.state_full(group["state_full"], full, rates, fused=group["fused"])
        if free:
            lists.state_free(rule, free, rates_free, fused=group["fused"], compiled=to_compile)

    return apply


def _rates(group: Group, *, on_device: bool = False) -> tuple[Rates, Rates]:
    """Return the rates of the state-full and of the state-free rule; with `on_device` an lr on a GPU stays there."""
    lr, scale, free_scale = group["lr"], 1.0, 1.0
    if not (on_device and isinstance(lr, Tensor) and lr.is_cuda):
        lr = float(lr)
    if group["split"]:
        scale, free_scale = group["split_lr_scale"], group["state_free_lr_scale"]
    decay = lr * group["weight_decay"]
    if group["maximize"]:  # every rule is W ← W − lr·u(G), and u(−G) is −u(G)
        lr = -lr
    beta1, beta2 = group["betas"]
    rates = Rates(lr * scale, decay, (beta1, beta2), group["eps"])
    return rates, Rates(lr * scale * free_scale, decay)


def _key(group: Group) -> int:
    is_drawn = group["stochastic_rounding"] or group["state_dtype"] == "int8"
    return noise_key(group["seed"], group["steps"]) if is_drawn else 0


def _first(param: Tensor, state: dict[str, Any], group: Group) -> tuple[int, int]:
    """Return the indices of this process's first entry within the whole parameter, and within its whole moments."""
    if not is_sharded(param):
        return 0, 0
    before, length = here(param).first, math.prod(param.shape[1:])
    chosen = selection(state, group)
    if not chosen:
        return before * length, before * length
    compact, rows = group["subspace"].compact(param.shape, chosen), group["subspace"].row_range(param.shape, chosen)
    return before * length, max(0, before - rows.first) * math.prod(compact[1:])


# -- in one launch ----------------------------------------------------------------------------------------------------


def _update_in_one_launch(group: Group, states: States, kept: Kept, places: Sequence[int]) -> Sequence[int]:
    """Update the tensors at these places that a launch can take; return the other places."""
    rules = group["state_full"], group["state_free"].kind if group["split"] else "none"
    if not places or not group["fused"] or rules[0] not in tables.RULES:
        return places
    if not tables.work_on(local(group["params"][places[0]]).device):
        return places
    ids = tuple(id(group["params"][place]) for place in places)
    key = (*rules, group["stochastic_rounding"], ids)
    launches = kept.get(key)
    if launches is None or not all(table.is_current(states) for table in launches.tables):
        tables.refuse_to_record(tables.UNTRIED)
        for other in [other for other in kept if not set(other[-1]).isdisjoint(ids)]:
            del kept[other]  # a tensor's step count lies in one table
        launches = kept[key] = _launches(group, states, places, rules)
    (rates, free), noise = _rates(group, on_device=True), _key(group)
    for table in launches.tables:
        table.launch(rates, free.lr, noise)
    return launches.rest


def check_recording(group: Group) -> None:
    """Raise a RuntimeError if a CUDA graph is being recorded that would repeat what changes from step to step."""
    if not group["capturable"]:
        tables.refuse_to_record("capturable is False")
    if group["stochastic_rounding"]:
        tables.refuse_to_record("stochastic_rounding would repeat its noise")
    if isinstance(group["lr"], Tensor) and not group["lr"].is_cuda:
        tables.refuse_to_record("lr is a tensor on the CPU, which no replay reads; move it to the GPU")


def _launches(group: Group, states: States, places: Sequence[int], rules: tuple[str, str]) -> Launches:
    found = {place: _member(group, states, place) for place in places}
    members = [member for member in found.values() if member is not None]
    together = alike(members, MOMENTS[rules[0]])
    rule_free = rules[1] if rules[1] in tables.RULES_FREE else "none"  # no member needs another
    made = [Table(some, rules[0], rule_free, group["stochastic_rounding"]) for some in together]
    return Launches(made, [place for place, member in found.items() if member is None])


def _member(group: Group, states: States, place: int) -> Member | None:
    """Return a tensor and its parts, with its moments begun; None if a launch cannot take it."""
    param = group["params"][place]
    state, target = states[param], local(param)
    chosen = selection_here(param, state, group)
    if not tables.takes(target) or (chosen and not group["subspace"].along_axis):
        return None
    has_state = not group["split"] or bool(state.get("entries"))
    is_full = has_state and not chosen
    if not is_full and group["state_free"].kind not in tables.RULES_FREE:
        return None
    storage.begin(param, state, group, chosen)
    moments = [state[name] for name in ("step", *MOMENTS[group["state_full"]])] if has_moments(state) else []
    in_codes = storage.in_codes(state, group)
    if in_codes and in_codes != list(moment_names(state, group)):  # of some moments alone; `begin` makes no such state
        return None
    moments += [state[SCALES[name]] for name in in_codes]
    if not all(moment.is_contiguous() and moment.device == target.device for moment in moments):
        return None
    first, first_moment = _first(param, state, group)
    parts = [Part("full" if has_state else "free", 0, target.numel(), first_moment)]
    if chosen:
        parts = _parts(target, state, group, chosen, first_moment)
    return Member(param, state if has_state else None, parts, group["first"] + place, first)


def _parts(target: Tensor, state: dict[str, Any], group: Group, chosen: Selection, first_moment: int) -> list[Part]:
    """Return the parts of a matrix of which some lines are selected."""
    subspace = group["subspace"]
    if subspace.in_place and not state["step"].ndim:  # else each line has a step count of its own
        (full, _), free = subspace.regions(target, target, chosen)
        return [
            Part("full", _offset(full, target), full.numel(), first_moment),
            *(Part("free", _offset(t, target), t.numel()) for t, *_ in free),
        ]
    axis, selected = subspace.axis(target.shape), subspace.positions(target.shape, chosen).to(target.device)
    slots = torch.full((target.shape[axis],), -1, dtype=torch.int32, device=target.device)
    slots.scatter_(0, selected, torch.arange(len(selected), dtype=torch.int32, device=target.device))
    slots = torch.cat([slots, selected.to(torch.int32)])
    return [Part("columns" if axis else "rows", 0, target.numel(), first_moment, slots)]


def _offset(view: Tensor, of: Tensor) -> int:
    return int(view.storage_offset() - of.storage_offset())


# -- one after the other, or in batches -------------------------------------------------------------------------------


def _update_in_turn(batch: Sequence[Due], group: Group, apply: Apply) -> None:
    """Update one tensor, or matrices of one shape for which the state-free rule makes directions in one call."""
    updates = [_regions(due, group, direction) for due, direction in zip(batch, _directions(batch, group), strict=True)]
    apply([one for full, _ in updates for one in full], [one for _, free in updates for one in free])
    for due, (full, _) in zip(batch, updates, strict=True):
        if full and group["split"]:
            group["subspace"].close(due.target, full[0].target, due.chosen)


def _directions(batch: Sequence[Due], group: Group) -> Sequence[Tensor | None]:
    """Return the direction of each tensor; None if its rule, applied later, makes it."""
    if not _takes_direction(batch[0].state, group, batch[0].chosen):
        return [None] * len(batch)
    rule, grads = group["state_free"], [due.grad for due in batch]
    params = [group["params"][due.place] for due in batch]
    if directions.are_shared(params[0], rule):
        return directions.made(rule, params, grads, group["first"] + batch[0].place)
    if len(batch) == 1:  # whose gradient needs no copy
        return [rule(grads[0])]
    return rule(torch.stack(grads)).unbind()


def _update_projected(batch: Sequence[Due], group: Group, _: Apply) -> None:
    """Update matrices of one shape [n_out, n_in] that are projected on bases of one shape, in few launches."""
    _, targets, grads, states, chosen = zip(*batch, strict=True)
    subspace, (rates, rates_free) = cast(Projection, group["subspace"]), _rates(group)
    bases = {"basis": torch.stack([each["basis"] for each in chosen])}
    rest = torch.stack(list(grads))
    compact = subspace.project(rest, bases)
    if group["state_free"].sees != "nothing":
        subspace.rest(rest, compact, bases, out=rest)
    moved = torch.zeros_like(compact)
    lists.state_full(group["state_full"], list(map(Full, moved, compact, states)), rates, fused=True)
    moved = subspace.back(moved, bases, targets[0].shape)
    tables.close_batch(targets, rest, moved, group["state_free"].kind, rates_free)


def _update_copies(due: Due, group: Group, rounding: Rounding, apply: Apply) -> None:
    """Update copies of a tensor and its moments in the working dtype; store the results."""
    place, target, grad, state, chosen = due
    dtype = storage.working_dtype(target)
    moments = moment_names(state, group)
    part = state
    is_whole = chosen or (_takes_direction(state, group, chosen) and not choices.goes_by_rows(group["state_free"].sees))
    for rows in [...] if is_whole else _slices(target):
        wide = target[rows].to(dtype)
        part = state | {name: storage.widened(state, name, rows, wide) for name in moments}
        if moments:
            part["step"] = state["step"].clone()
        _update_in_turn([Due(place, wide, grad[rows].to(dtype), part, chosen)], group, apply)
        part_rounding = rounding if rows is ... else rounding.after(rows.start * math.prod(target.shape[1:]))
        if target.dtype != dtype:
            part_rounding.store(target[rows], wide, 0)
        for role, name in enumerate(moments, 1):
            storage.store(state, name, rows, part[name], part_rounding, role)
    if moments:
        state["step"].copy_(part["step"])  # in place: work on another stream may not have read it yet


def _slices(tensor: Tensor) -> Iterator[Any]:
    """Yield indices that divide a tensor into parts of about `_IN_A_SLICE` entries, whose copies need less memory."""
    most = _IN_A_SLICE * (_SLICES_OF_A_LAUNCH if tensor.is_cuda else 1)
    if tensor.numel() <= most:
        yield ...
        return
    rows = max(1, most * len(tensor) // tensor.numel())
    most_slices = 2 if isinstance(tensor, FakeTensor) else None  # an estimate: all slices take the same memory
    for first in itertools.islice(range(0, len(tensor), rows), most_slices):
        yield slice(first, first + rows)
