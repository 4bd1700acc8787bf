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
from adafrugal.optim.sharding.shards import local
from adafrugal.optim.state import SCALES, has_moments, moment_names
from adafrugal.optim.subspaces import Selection

_FEWEST = 4096  # entries of a matrix whose moments are stored in 8 bits
_WITHOUT_SIGN = ("exp_avg_sq",)


def begin(param: Tensor, state: dict[str, Any], group: Group, chosen: Selection) -> None:
    """Initialise a tensor's moments to zeros at its first gradient, if it keeps moments in this period."""
    if has_moments(state) or (group["split"] and not state.get("entries")):
        return
    target = local(param)
    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(target, group))
    given = group["state_dtype"]
    dtype = working_dtype(target) if given in (None, "int8") else getattr(torch, given)
    like = target.new_empty(group["subspace"].compact(target.shape, chosen)) if chosen else target
    for name in MOMENTS[group["state_full"]]:
        if given == "int8" and _takes_codes(param):
            state[name], state[SCALES[name]] = eight_bits.zeros(like, is_signed=name not in _WITHOUT_SIGN)
        else:
            state[name] = torch.zeros_like(like, dtype=dtype)


def _takes_codes(param: Tensor) -> bool:
    """Return whether a parameter is large enough for 8 bits; of a sharded one all processes say the same."""
    return param.ndim > 1 and param.numel() >= _FEWEST and param.dtype != torch.float64


def in_codes(state: Mapping[str, Any], group: Group) -> list[str]:
    """Return the names of the moments that are stored in 8 bits."""
    return [name for name in moment_names(state, group) if name in state and _is_in_codes(state, name)]


def step_device(param: Tensor, group: Group) -> torch.device:
    """Return the device of step counts: the CPU, or a GPU if kernels read them there."""
    return param.device if group["fused"] and param.is_cuda else torch.device("cpu")


def working_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.promote_types(param.dtype, torch.float32)


def is_in_fewer_bits(param: Tensor, state: Mapping[str, Any], group: Group) -> bool:
    """Return whether a tensor or its moments are stored in another dtype than they are updated in."""
    if param.dtype == torch.float32 and group["state_dtype"] is None:  # the usual case
        return False
    stored = [param, *(state[name] for name in moment_names(state, group))]
    return any(value.dtype != working_dtype(param) for value in stored)


def widened(state: Mapping[str, Any], name: str, rows: Any, dtype: torch.dtype) -> Tensor:
    """Return some rows (`...`: all) of a moment in the dtype of the update: a view if it is stored so, else a copy."""
    if _is_in_codes(state, name):
        return eight_bits.decode(state[name][rows], state[SCALES[name]][rows])
    value: Tensor = state[name][rows].to(dtype)
    return value


def store(state: Mapping[str, Any], name: str, rows: Any, value: Tensor, rounding: Rounding, role: int) -> None:
    """Write a result into some rows of a moment; a moment of the update's own dtype was updated in place."""
    if _is_in_codes(state, name):
        noise = rounding.noise(value, role)
        for target, part in zip((state[name], state[SCALES[name]]), _encoded(name, value, noise), strict=True):
            target[rows].copy_(part)
    elif state[name].dtype != value.dtype:
        rounding.store(state[name][rows], value, role)


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
