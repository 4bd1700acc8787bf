"""A saved state of the optimizer: how it is saved, whether it is this one's, and what is made of it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import options, refresh, rules
from adafrugal.optim import state as tensor_state
from adafrugal.optim.sharding import shards
from adafrugal.optim.subspaces import Run, Subspace
from adafrugal.optim.subspaces import subspace as as_subspace


def restored_subspace(settings: Mapping[str, Any], old: Subspace) -> Subspace:
    """The subspace of these settings: of the class of the one it replaces, which may be anybody's own, or ours."""
    if settings["kind"] != old.kind:
        return as_subspace(settings)
    return type(old)(**{key: value for key, value in settings.items() if key != "kind"})


# -- parts and wholes -------------------------------------------------------------------------------------------------


def shared(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """A sharded parameter's state with what lies by rows as DTensors of the whole; all the rest as it is."""
    run = _run(state, param, group)
    by_rows = {name for name in state if _lies_by_rows(name, state[name], param, group)}
    return {name: shards.shared(value, param, run) if name in by_rows else value for name, value in state.items()}


def kept(saved: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """What this process keeps of a parameter's saved state: copies, each on the device where it is read."""
    found = dict(saved)
    for name, value in saved.items():
        if isinstance(value, Tensor):
            part = own_part(name, value, param, saved, group)
            is_counter = name == "step" and part.ndim == 0
            device = tensor_state.step_device(param, group) if is_counter else param.device
            found[name] = torch.empty_like(part, device=device).copy_(part)
    return found


def own_part(name: str, value: Tensor, param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """What this process keeps of a tensor of a parameter's saved state."""
    if shards.is_sharded(param) and _lies_by_rows(name, value, param, group):
        return shards.own_part(value, param, _run(saved, param, group))
    return shards.whole(value)


def _run(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> Run:
    """The rows of a parameter that its whole moments have a row for."""
    chosen = refresh.selection(state, group) if group["split"] else {}
    return group["subspace"].run(param.shape, chosen) if chosen else Run(0, param.shape[0])


def _lies_by_rows(name: str, value: Any, param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether it is a moment, or a step count for each row."""
    if name in rules.STATE_FULL[group["state_full"]].moments:
        return True
    counts = name == "step" and value.ndim > 0
    return counts and group["subspace"].axis(param.shape) == 0


# -- whose state it is ------------------------------------------------------------------------------------------------


def refuse_other(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse a saved state of other groups than these, or of tensors of other shapes."""
    saved = [(group.get("split"), group.get("shapes")) for group in state_dict["param_groups"]]
    ours = [(group["split"], group["shapes"]) for group in groups]
    if saved != ours:
        raise ValueError(
            f"the saved state is not this optimizer's: its groups are {_outline(saved)}, ours {_outline(ours)}; "
            "make the optimizer over the same model's groups before loading"
        )
    for theirs, group in zip(state_dict["param_groups"], groups, strict=True):
        for number, name, param in zip(theirs["params"], options.names(group), group["params"], strict=True):
            _refuse_other_shapes(name, param, state_dict["state"].get(number, {}), theirs, group)


def _refuse_other_shapes(
    name: str, param: Tensor, state: Mapping[str, Any], saved: Mapping[str, Any], group: Mapping[str, Any]
) -> None:
    expected = param.shape
    if group["split"] and (space := restored_subspace(saved["subspace"], group["subspace"])).remembers and state:
        chosen = {key: state[key] for key in space.remembers if key in state}
        expected = space.compact(param.shape, chosen) if chosen else expected
    for key in rules.STATE_FULL[saved["state_full"]].moments:
        if key in state and state[key].shape != expected:
            raise ValueError(
                f"the saved {key} of parameter {name} has shape {list(state[key].shape)}; its whole has "
                f"{list(expected)}: load a state as state_dict gave it, not what one process keeps"
            )


def _outline(groups: list[tuple[bool | None, list[list[int]] | None]]) -> str:
    return "; ".join(f"{'split' if split else 'not split'}, shapes {shapes}" for split, shapes in groups)
