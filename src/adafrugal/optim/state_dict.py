"""Saved states: check that they fit an optimizer, divide them over processes, make them whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import choices
from adafrugal.optim.options import Group, parameter_names
from adafrugal.optim.refresh import selection
from adafrugal.optim.rules import MOMENTS
from adafrugal.optim.sharding import shards
from adafrugal.optim.state_free import StateFree, state_free
from adafrugal.optim.subspaces import RowRange, Subspace
from adafrugal.optim.subspaces import subspace as as_subspace
from adafrugal.optim.updates import step_device


def restored_subspace(settings: Mapping[str, Any], old: Subspace) -> Subspace:
    """Return the subspace of saved settings: a built-in one, or one of `old`'s class if the kinds agree."""
    if settings["kind"] != old.kind:
        return as_subspace(settings)
    return type(old)(**{key: value for key, value in settings.items() if key != "kind"})


def restored_rule(saved: str | Mapping[str, Any], old: StateFree) -> StateFree:
    """Return the state-free rule of a saved state: a registered one, or one of `old`'s class if the kinds agree."""
    kind, settings = choices.described(saved)
    return type(old)(**settings) if kind == old.kind else state_free(saved)


def with_shared(state: Mapping[str, Any], param: Tensor, group: Group) -> dict[str, Any]:
    """Return a sharded parameter's state with row-wise tensors as DTensors of the whole."""
    rows = _rows(state, param, group)
    return {
        name: shards.shared(value, param, rows) if _lies_by_rows(name, value, param, group) else value
        for name, value in state.items()
    }


def kept_here(saved: Mapping[str, Any], param: Tensor, group: Group) -> dict[str, Any]:
    """Return this process's part of a parameter's saved state: copies, each on the device where it is read."""
    found = dict(saved)
    for name, value in saved.items():
        if isinstance(value, Tensor):
            if shards.is_sharded(param) and _lies_by_rows(name, value, param, group):
                part = shards.own_part(value, param, _rows(saved, param, group))
            else:
                part = shards.whole(value)
            is_counter = name == "step" and part.ndim == 0
            device = step_device(param, group) if is_counter else param.device
            found[name] = torch.empty_like(part, device=device).copy_(part)
    return found


def _rows(state: Mapping[str, Any], param: Tensor, group: Group) -> RowRange:
    """Return the rows of a parameter that its whole moments cover."""
    chosen = selection(state, group)
    return group["subspace"].row_range(param.shape, chosen) if chosen else RowRange(0, param.shape[0])


def _lies_by_rows(name: str, value: Any, param: Tensor, group: Group) -> bool:
    """Return whether a value is a moment, or has a step count for each row."""
    if name in MOMENTS[group["state_full"]]:
        return True
    return name == "step" and value.ndim > 0 and group["subspace"].axis(param.shape) == 0


def refuse_other(state_dict: Mapping[str, Any], groups: list[Group]) -> None:
    """Raise a ValueError if a saved state has other groups or other shapes than these."""
    saved = [(group.get("split"), group.get("shapes")) for group in state_dict["param_groups"]]
    ours = [(group["split"], group["shapes"]) for group in groups]
    if saved != ours:
        theirs, mine = (
            "; ".join(f"{'split' if split else 'not split'}, shapes {shapes}" for split, shapes in found)
            for found in (saved, ours)
        )
        raise ValueError(
            f"the saved state is not this optimizer's: its groups are {theirs}, ours {mine}; "
            "make the optimizer over the same model's groups before loading"
        )
    for theirs, group in zip(state_dict["param_groups"], groups, strict=True):
        subspace = restored_subspace(theirs["subspace"], group["subspace"]) if group["split"] else None
        for number, name, param in zip(theirs["params"], parameter_names(group), group["params"], strict=True):
            state = state_dict["state"].get(number, {})
            chosen = selection(state, {"split": group["split"], "subspace": subspace})
            expected = subspace.compact(param.shape, chosen) if chosen else param.shape
            for key in MOMENTS[theirs["state_full"]]:
                if key in state and state[key].shape != expected:
                    raise ValueError(
                        f"the saved {key} of parameter {name} has shape {list(state[key].shape)}; its whole has "
                        f"{list(expected)}: load a state as state_dict gave it, not one process's part"
                    )
