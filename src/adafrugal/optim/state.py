"""The state of one parameter: tensors and numbers, under keys that stay while selections come and go.

torch.distributed.checkpoint reads a checkpoint into the keys that are there. So a tensor that does not exist at present
has an empty one [0] in its place, and a number is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim.options import Group
from adafrugal.optim.rules import MOMENTS
from adafrugal.optim.subspaces import Selection

# the scales of moments that are stored in 8 bits, by the moment's name
SCALES = {name: f"{name}_scale" for names in MOMENTS.values() for name in names}


def complete(state: dict[str, Any], param: Tensor, group: Group) -> dict[str, Any]:
    """Add the keys that a parameter's state lacks, on its device; return the state."""
    numbers: tuple[str, ...] = ()
    tensors = moment_keys(group)
    if group["split"]:
        subspace = group["subspace"]
        numbers = "entries", "turn", *subspace.numbers  # `turn` is the period of the selection
        tensors += tuple(name for name in subspace.remembers if name not in subspace.numbers)
        tensors += ("first_grad",) if group["interval"].keeps_gradients else ()
    for name in tensors:
        if name not in state:
            state[name] = torch.empty(0, dtype=torch.float32, device=param.device)
    for name in numbers:
        state.setdefault(name, 0)
    return state


def complete_all(states: MutableMapping[Tensor, dict[str, Any]], groups: Iterable[Group]) -> None:
    """Add the keys that the states of all parameters lack."""
    for group in groups:
        for param in group["params"]:
            complete(states[param], param, group)


def has_moments(state: Mapping[str, Any]) -> bool:
    """Return whether moments have begun: at the first gradient after a selection."""
    return "step" in state and state["step"].shape != (0,)


def moment_keys(group: Group) -> tuple[str, ...]:
    """Return the keys of a state that begin anew with the moments: step count, moments, scales of 8-bit moments."""
    names = MOMENTS[group["state_full"]]
    return "step", *names, *(SCALES[name] for name in names if group["state_dtype"] == "int8")


def moment_names(state: Mapping[str, Any], group: Group) -> tuple[str, ...]:
    """Return the names of the moments that a state has."""
    return MOMENTS[group["state_full"]] if has_moments(state) else ()


def first_gradient(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the name of the first gradient of the selection (`Displacement`), if a state has it."""
    return ("first_grad",) if "first_grad" in state and state["first_grad"].shape != (0,) else ()


def forget_moments(state: dict[str, Any], param: Tensor, group: Group) -> None:
    """Let moments and step counts begin again."""
    for name in moment_keys(group):
        state.pop(name, None)
    complete(state, param, group)


def selection(state: Mapping[str, Any], group: Group) -> Selection:
    """Return a matrix's selection from its state; empty for tensors that are not split, or have nothing selected."""
    if not group["split"] or not state.get("entries"):
        return {}
    return {name: state[name] for name in group["subspace"].remembers if name in state}
