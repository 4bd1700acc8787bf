"""The state of one tensor: its initial moments, and the dtypes for storage and updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adafrugal.optim.options import Group
from adafrugal.optim.rules import MOMENTS


def begin(state: dict[str, Any], compact: Tensor, group: Group, dtype: torch.dtype | None = None) -> None:
    """Initialise moments to zeros like a compact tensor, at the first gradient."""
    if "step" in state:
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(compact, group))
    for name in MOMENTS[group["state_full"]]:
        state[name] = torch.zeros_like(compact, dtype=dtype, memory_format=torch.preserve_format)


def has_moments(state: dict[str, Any], group: Group) -> bool:
    """Return whether a tensor keeps moments in this period."""
    return not group["split"] or bool(state.get("entries"))


def step_device(param: Tensor, group: Group) -> torch.device:
    """Return the device of step counts: the CPU, or a GPU if kernels read them there."""
    return param.device if group["fused"] and param.is_cuda else torch.device("cpu")


def working_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter is updated."""
    return torch.promote_types(param.dtype, torch.float32)


def state_dtype(param: Tensor, group: Group) -> torch.dtype:
    """Return the dtype in which a parameter's moments are stored."""
    return getattr(torch, group["state_dtype"]) if group["state_dtype"] else working_dtype(param)


def in_fewer_bits(param: Tensor, group: Group, state: dict[str, Any]) -> bool:
    """Return whether a tensor or its moments are stored in another dtype than they are updated in."""
    if param.dtype == torch.float32 and group["state_dtype"] is None:  # the usual case
        return False
    working = working_dtype(param)
    return param.dtype != working or (has_moments(state, group) and state_dtype(param, group) != working)
