"""The updates of one step, after subspaces are selected, in one of three ways for each tensor.

`together`: tensors that rules update in place, all of a group in few launches. `alone`: matrices whose subspace works
on copies, one after the other, so that only one matrix is copied at a time. `in fewer bits`: tensors stored in fewer
bits than they are updated in, by copies in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import kernels
from adafrugal.optim.options import Group
from adafrugal.optim.refresh import States, selection_here
from adafrugal.optim.rounding import Rounding
from adafrugal.optim.rules import MOMENTS, Free, Full, Rates
from adafrugal.optim.sharding.shards import here, local
from adafrugal.optim.state import begin, has_moments, in_fewer_bits, state_dtype, working_dtype
from adafrugal.optim.subspaces import Selection

_IN_A_SLICE = 2**22  # entries copied at once, to update them in more bits than they are stored in


def update(group: Group, states: States) -> None:
    """Update the tensors of a group that have a gradient."""
    full: list[Full] = []
    free: list[Free] = []
    together = not group["split"] or group["subspace"].in_place
    for place, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        state, target, grad = states[param], local(param), local(param.grad)
        chosen = selection_here(param, state, group)
        if in_fewer_bits(target, group, state):
            noise = group["seed"], group["steps"], group["first"] + place, here(param).first
            rounding = Rounding(group["stochastic_rounding"], *noise)
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
    lr, scale = float(group["lr"]), group["split_lr_scale"] if group["split"] else 1.0
    decay = lr * group["weight_decay"]
    rates = Rates(lr * scale, decay, tuple(group["betas"]), group["eps"])
    kernels.state_full(group["state_full"], full, rates, fused=group["fused"])
    if group["split"]:
        rates = Rates(lr * scale * group["state_free_lr_scale"], decay)
        kernels.state_free(group["state_free"], free, rates, compiled=kernels.compiles(group))


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
        _update_copy(target[rows], grad[rows], part, group, chosen, rounding)
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
    rounding.store(target, wide)
    for name in moments if stored_dtype != dtype and moments[0] in state else ():
        result = state[name]
        state[name] = stored.get(name, torch.empty_like(result, dtype=stored_dtype))
        rounding.store(state[name], result)


def _slices(tensor: Tensor) -> Iterator[Any]:
    """Yield indices that divide a tensor into parts of about `_IN_A_SLICE` entries."""
    if tensor.numel() <= _IN_A_SLICE:
        yield ...
        return
    rows = max(1, _IN_A_SLICE * len(tensor) // tensor.numel())
    for first in range(0, len(tensor), rows):
        yield slice(first, first + rows)
