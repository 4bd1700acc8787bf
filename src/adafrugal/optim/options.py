"""What a parameter group may say: every value within its range, parts that go together, and what is worth a warning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from adafrugal.optim import controls, rules
from adafrugal.optim.sharding import shards
from adafrugal.optim.subspaces import Blocks, Subspace
from adafrugal.optim.subspaces import subspace as as_subspace

Shrink = Literal["immediately", "at_refresh"]
Nonfinite = Literal["error", "skip"]
StateDtype = Literal["float32", "bfloat16"]
ON_REFRESH = Subspace.policies
_ON_SHARDS = 'allowed: blocks, columns, slab, {"kind": "svd", "side": "right"}, {"kind": "random", "side": "right"}'


def names(group: Mapping[str, Any]) -> list[str]:
    """What its parameters are called in messages."""
    return group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]


def check_group(group: Mapping[str, Any]) -> None:
    """Every number and name within its range."""
    pair = len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])
    for name, allowed, held in (
        ("lr", "0 or more", 0 <= group["lr"] < float("inf")),
        ("betas", "two numbers from 0 to below 1", pair),
        ("eps", "0 or more", group["eps"] >= 0),
        ("weight_decay", "0 or more", group["weight_decay"] >= 0),
        ("split_lr_scale", "0 or more", group["split_lr_scale"] >= 0),
        ("state_free_lr_scale", "0 or more", group["state_free_lr_scale"] >= 0),
        ("stagger", "a whole number of steps, 1 or more", isinstance(group["stagger"], int) and group["stagger"] >= 1),
        *((name, ", ".join(choices), group[name] in choices) for name, choices in {
            "state_full": tuple(rules.STATE_FULL), "state_free": tuple(rules.STATE_FREE),
            "on_refresh": ON_REFRESH, "shrink": get_args(Shrink),
        }.items()),
        ("state_dtype", ", ".join(get_args(StateDtype)), group["state_dtype"] in (None, *get_args(StateDtype))),
    ):  # fmt: skip
        if not held:
            raise ValueError(f"{name} is {group[name]!r}; allowed: {allowed}")


def settle(group: dict[str, Any]) -> None:
    """Make controls and a subspace, each a group's own, of what was given for them."""
    group["density"] = controls.density(group["density"])
    group["interval"] = controls.interval(group["interval"])
    group["subspace"] = as_subspace(group["subspace"])
    check_parts(group)


def check_parts(group: Mapping[str, Any]) -> None:
    """Parts of a split group that must go together."""
    subspace, is_free = group["subspace"], group["density"] == controls.Constant(0)
    if group["on_refresh"] not in subspace.policies:
        allowed = ", ".join(subspace.policies)
        raise ValueError(f"on_refresh is {group['on_refresh']!r}; {subspace.kind} allows {allowed}")
    if group["stagger"] > 1 and isinstance(subspace, Blocks):
        raise ValueError(f"stagger is {group['stagger']}; blocks choose among all matrices at once: set it to 1")
    if "layers" in group and len(group["layers"]) != len(group["params"]):
        raise ValueError(f"layers has {len(group['layers'])} numbers for {len(group['params'])} parameters")
    for name, param in zip(names(group), group["params"], strict=True):
        if shards.is_sharded(param) and not is_free:
            _check_sharded(name, param, subspace)
        if param.ndim != 2 and not (subspace.any_shape or is_free):
            raise ValueError(
                f"parameter {name} of a split group has shape {tuple(param.shape)}; {subspace.kind} splits only "
                "matrices: put it into a group without split=True"
            )


def _check_sharded(name: str, param: Tensor, subspace: Subspace) -> None:
    if reason := subspace.why_whole():
        raise ValueError(f"parameter {name} is sharded over processes, and {subspace.kind} {reason}; {_ON_SHARDS}")
    if not shards.is_split_by_rows(param):
        allowed = "along its first axis, over one dimension of the mesh"
        raise ValueError(f"parameter {name} is sharded as {param.placements}; allowed: {allowed}")


def lost_in_rounding(group: Mapping[str, Any]) -> Iterable[str]:
    """What rounding to the nearest loses in a group."""
    stochastic = group["stochastic_rounding"]
    lossy = {torch.float16} if stochastic else {torch.float16, torch.bfloat16}
    if any(param.dtype in lossy for param in group["params"]):
        yield (
            "weights in 16 bits, rounded to the nearest, lose every update under about 1/512 of a weight (bfloat16), "
            "and signSGD with a small lr moves nothing: set stochastic_rounding=True (bfloat16), or keep float32 "
            "weights and use autocast"
        )
    if group["state_dtype"] == "bfloat16" and not stochastic:
        yield (
            "moments in bfloat16, rounded to the nearest, do not fall where 1 − β is under about 1/512, as β₂ = 0.999 "
            "has it: set stochastic_rounding=True"
        )
