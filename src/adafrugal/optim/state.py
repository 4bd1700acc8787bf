"""What is remembered of one tensor: how it begins, in which types it is stored and updated, and where it is counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import rules

_IN_A_SLICE = 2**22  # entries that are copied at once to be updated in more bits than they are stored in


def begin(state: dict[str, Any], compact: Tensor, group: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Moments begin, as zeros of the compact size, with the first gradient."""
    if "step" in state:
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(compact, group))
    for name in rules.STATE_FULL[group["state_full"]].moments:
        state[name] = torch.zeros_like(compact, dtype=dtype, memory_format=torch.preserve_format)


def slices(param: Tensor) -> Iterator[Any]:
    """Indices of parts that make up a tensor, of about `_IN_A_SLICE` entries each."""
    if param.numel() <= _IN_A_SLICE:
        yield ...
        return
    rows = max(1, _IN_A_SLICE * len(param) // param.numel())
    for first in range(0, len(param), rows):
        yield slice(first, first + rows)


def step_device(param: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Step counts are read on the host, except by torch's fused kernel on a GPU."""
    fused = group["fused"] and group["state_full"] == "adamw"
    return param.device if fused and param.is_cuda else torch.device("cpu")


def working_dtype(param: Tensor) -> torch.dtype:
    """In which the update is made."""
    return torch.promote_types(param.dtype, torch.float32)


def state_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """In which the moments are stored."""
    return getattr(torch, group["state_dtype"]) if group["state_dtype"] else working_dtype(param)


def in_fewer_bits(param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether a tensor, or the moments it has, are stored in another dtype than the update is made in."""
    if param.dtype == torch.float32 and group["state_dtype"] is None:  # nearly always
        return False
    keeps_moments = not group["split"] or state.get("entries")
    working = working_dtype(param)
    return param.dtype != working or bool(keeps_moments and state_dtype(param, group) != working)
