"""The updates of one step, after subspaces are selected, in one of three ways for each tensor.

`together`: tensors that rules update in place, all of a group in few launches. `alone`: matrices whose subspace works
on copies, one after the other, so that only one matrix is copied at a time. `in fewer bits`: tensors stored in fewer
bits than they are updated in, by copies in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import kernels
from adafrugal.optim.options import Group
from adafrugal.optim.refresh import States, selection_here
from adafrugal.optim.rounding import Rounding
from adafrugal.optim.rules import MOMENTS, Free, Full, Rates
from adafrugal.optim.sharding.shards import here, local
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
        _begin(target, state, group, chosen)
        if _in_fewer_bits(target, state, group):
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
        if param.grad is not None:
            _begin(local(param), states[param], group, selection_here(param, states[param], group))


def _begin(target: Tensor, state: dict[str, Any], group: Group, chosen: Selection) -> None:
    """Initialise a tensor's moments to zeros at its first gradient, if it keeps moments in this period."""
    if "step" in state or (group["split"] and not state.get("entries")):
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(target, group))
    dtype = getattr(torch, group["state_dtype"]) if group["state_dtype"] else _working_dtype(target)
    like = target.new_empty(group["subspace"].compact(target.shape, chosen)) if chosen else target
    for name in MOMENTS[group["state_full"]]:
        state[name] = torch.zeros_like(like, dtype=dtype)


def step_device(param: Tensor, group: Group) -> torch.device:
    """Return the device of step counts: the CPU, or a GPU if torch's fused kernel reads them there."""
    fused = group["fused"] and group["state_full"] == "adamw"
    return param.device if fused and param.is_cuda else torch.device("cpu")


def _working_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.promote_types(param.dtype, torch.float32)


def _in_fewer_bits(param: Tensor, state: dict[str, Any], group: Group) -> bool:
    """Return whether a tensor or its moments are stored in another dtype than they are updated in."""
    if param.dtype == torch.float32 and group["state_dtype"] is None:  # the usual case
        return False
    stored = [param, *(state[name] for name in MOMENTS[group["state_full"]] if name in state)]
    return any(value.dtype != _working_dtype(param) for value in stored)


def _regions(
    target: Tensor, grad: Tensor, state: dict[str, Any], group: Group, chosen: Selection
) -> tuple[list[Full], Sequence[Free]]:
    """Return a tensor's updates by the state-full rule and by the state-free rule."""
    if not group["split"]:
        return [Full(target, grad, state)], ()
    if not state.get("entries"):
        return [], (Free(target, grad),)
    regions = group["subspace"].regions(target, grad, chosen, group["state_free"] != "none")
    return [Full(*regions.full, state)], regions.free


def _apply_rules(group: Group, full: Sequence[Full], free: Sequence[Free]) -> None:
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
    """Update copies of a tensor and its moments in the working dtype; store the results."""
    dtype = _working_dtype(target)
    moments = [name for name in MOMENTS[group["state_full"]] if name in state]
    part = state
    for rows in [...] if chosen else _slices(target):  # without a selection, updates are elementwise
        part = state | {name: state[name][rows].to(dtype) for name in moments}
        if moments:
            part["step"] = state["step"].clone()
        wide = target[rows].to(dtype, copy=True)
        _update_alone(wide, grad[rows].to(dtype), part, group, chosen)
        rounding.store(target[rows], wide)
        for name in moments:
            if state[name].dtype != dtype:
                rounding.store(state[name][rows], part[name])
    if moments:
        state["step"] = part["step"]


def _slices(tensor: Tensor) -> Iterator[Any]:
    """Yield indices that divide a tensor into parts of about `_IN_A_SLICE` entries, whose copies need less memory."""
    if tensor.numel() <= _IN_A_SLICE:
        yield ...
        return
    rows = max(1, _IN_A_SLICE * len(tensor) // tensor.numel())
    for first in range(0, len(tensor), rows):
        yield slice(first, first + rows)
