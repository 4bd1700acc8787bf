"""How the moments of a parameter are stored: their dtype and device, and codes in 8 bits with their scales.

The rules, and changes of a selection, work on float values, to which this module converts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import eight_bits
from adafrugal.optim.options import Group
from adafrugal.optim.rounding import Rounding
from adafrugal.optim.rules import MOMENTS
from adafrugal.optim.sharding.shards import is_split_by_rows, local
from adafrugal.optim.state import SCALES, has_moments, moment_keys, moment_names
from adafrugal.optim.subspaces import Selection

_FEWEST = 4096  # entries of a matrix whose moments are stored in 8 bits
_SHORTEST = 16  # entries of a row; scales of shorter ones would take what the codes save
_WITHOUT_SIGN = ("exp_avg_sq",)


def begin(param: Tensor, state: dict[str, Any], group: Group, chosen: Selection) -> None:
    """Initialise a tensor's moments to zeros at its first gradient, if it keeps moments in this period."""
    if has_moments(state) or (group["split"] and not state.get("entries")):
        return
    target = local(param)
    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(target, group))
    given = group["state_dtype"]
    dtype = working_dtype(target) if given in (None, "int8") else getattr(torch, given)
    shape = group["subspace"].compact(target.shape, chosen) if chosen else target.shape
    like = torch.empty(shape, dtype=dtype, device="meta")
    for name in MOMENTS[group["state_full"]]:
        parts = {name: like}
        if given == "int8" and _takes_codes(param, like):
            parts = dict(zip((name, SCALES[name]), eight_bits.zeros(like, name not in _WITHOUT_SIGN), strict=True))
        for key, part in parts.items():
            state[key] = empty_like(key, part, param, group).zero_()


def empty_like(name: str, value: Tensor, param: Tensor, group: Group) -> Tensor:
    """Return an uninitialised tensor like a value of a parameter's state, on the device where it is read."""
    device = param.device
    if name == "step" and not value.ndim:
        device = step_device(param, group)
    elif name in moment_keys(group):
        device = moment_device(param, group)
    is_pinned = bool(value.ndim) and param.is_cuda and device != param.device  # so that copies to the GPU are fast
    return torch.empty_like(value, device=device, pin_memory=is_pinned)


def _takes_codes(param: Tensor, moment: Tensor) -> bool:
    """Return whether a parameter's moments are stored in 8 bits; of a sharded one all processes say the same."""
    is_large = param.ndim > 1 and param.numel() >= _FEWEST
    length = moment.shape[min(1, moment.ndim - 1) :].numel()
    return is_large and length >= _SHORTEST and param.dtype != torch.float64 and is_split_by_rows(param)


def in_codes(state: Mapping[str, Any], group: Group) -> list[str]:
    """Return the names of the moments that are stored in 8 bits."""
    return [name for name in moment_names(state, group) if name in state and _is_in_codes(state, name)]


def step_device(param: Tensor, group: Group) -> torch.device:
    """Return the device of step counts: the CPU, or a GPU if kernels read them there."""
    return param.device if group["fused"] and param.is_cuda else torch.device("cpu")


def moment_device(param: Tensor, group: Group) -> torch.device:
    """Return the device on which a parameter's moments lie."""
    is_away = group["state_on"] == "cpu_always_full" and not group["split"]
    return torch.device("cpu") if is_away else param.device


def working_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.promote_types(param.dtype, torch.float32)


def needs_copies(param: Tensor, state: Mapping[str, Any], group: Group) -> bool:
    """Return whether a tensor or its moments are stored in another dtype, or elsewhere, than they are updated in."""
    stored = [param, *(state[name] for name in moment_names(state, group))]
    return any(value.dtype != working_dtype(param) or value.device != param.device for value in stored)


def widened(state: Mapping[str, Any], name: str, rows: Any, like: Tensor) -> Tensor:
    """Return some rows (`...`: all) of a moment in dtype and on device of `like`: a view if it is so, else a copy."""
    if _is_in_codes(state, name):
        return eight_bits.decode(*(_moved(state[key][rows], like) for key in (name, SCALES[name])))
    value: Tensor = _moved(state[name][rows], like).to(like.dtype)  # one copy of both would be by pageable memory
    return value


def store(state: Mapping[str, Any], name: str, rows: Any, value: Tensor, rounding: Rounding, role: int) -> None:
    """Write a result into some rows of a moment, unless it was a view of them."""
    if _is_in_codes(state, name):
        noise = rounding.noise(value, role)
        for target, part in zip((state[name], state[SCALES[name]]), _encoded(name, value, noise), strict=True):
            target[rows].copy_(part, non_blocking=True)
    elif (state[name].dtype, state[name].device) != (value.dtype, value.device):
        rounding.store(state[name][rows], value, role)


def _moved(stored: Tensor, like: Tensor) -> Tensor:
    return stored.to(like.device, non_blocking=True)


@contextmanager
def decoded(state: dict[str, Any], group: Group) -> Iterator[None]:
    """Let moments be cut or moved as float32 values, and encode what is left of them, to the nearest code."""
    names = in_codes(state, group)
    for name in names:
        state[name] = eight_bits.decode(state[name], state.pop(SCALES[name]))
    yield
    for name in names if has_moments(state) else ():
        state[name], state[SCALES[name]] = _encoded(name, state[name], None)


def _encoded(name: str, value: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    return eight_bits.encode(value, name not in _WITHOUT_SIGN, noise)


def _is_in_codes(state: Mapping[str, Any], name: str) -> bool:
    return not state[name].dtype.is_floating_point
