"""The keys of a parameter group, and checks of their values; ranges and names come from `choices`."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from adafrugal.optim import choices, controls
from adafrugal.optim.controls import Control
from adafrugal.optim.sharding import shards
from adafrugal.optim.state_free import StateFree
from adafrugal.optim.state_free import state_free as as_state_free
from adafrugal.optim.subspaces import Subspace
from adafrugal.optim.subspaces import subspace as as_subspace
from adafrugal.optim.values import as_plain


class SplitOptions(TypedDict, total=False):
    """The options of split groups only; see `Frugal`."""

    density: Control
    density_scale: float
    interval: Control
    subspace: Subspace
    shrink: str
    stagger: int  # steps
    split_lr_scale: float
    state_free: StateFree
    state_free_lr_scale: float
    on_refresh: str
    compile: bool | None


class Clocks(TypedDict, total=False):
    """The counts of split groups only."""

    since_refresh: int  # steps since the last refresh, 1 at the step of the refresh
    refreshes: int
    handed_out: int  # blocks selected at earlier refreshes; an ordered selection continues from there
    density_read: float  # ρ in force
    waiting: list[int]  # indices in params of matrices that have not selected since the last refresh
    bases_kept: int  # selections deferred because a gradient was not finite


class Group(SplitOptions, Clocks, total=False):
    """A parameter group of `Frugal`, as `state_dict` saves it."""

    params: list[Tensor]
    param_names: list[str]  # if the optimizer was given names
    shapes: list[list[int]]  # of the params
    first: int  # index of the first of them among all parameters
    layers: list[int]  # index of each one's transformer block, if known
    split: bool
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    state_full: str
    state_dtype: str | None
    state_on: str
    stochastic_rounding: bool
    fused: bool
    foreach: bool | None
    capturable: bool
    nonfinite: str | None
    maximize: bool
    seed: int
    steps: int  # without skipped ones
    skipped_steps: int


# options of torch's optimizers that Frugal does not have; a group may say that they are off
_FOREIGN = "amsgrad", "dampening", "differentiable", "momentum", "nesterov"


def prepared(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a group that is to be added.

    Keys that Frugal does not know are kept, as in torch, since schedulers and trainers have keys of their own. Only one
    that reads like an option is refused, and only in a new group.

    Raises:
        ValueError: a key is misspelt, or stands for something that this group or Frugal cannot do.
    """
    group = dict(group)
    refuse_foreign(group)
    if "nonfinite" in group:
        raise ValueError("a group names nonfinite, which concerns whole steps: give it to the optimizer")
    refuse_misspelt(group, {*defaults, "layers", "steps"})
    named = [key for key in SplitOptions.__annotations__ if key in group]
    if named and not group.get("split", defaults["split"]):
        raise ValueError(f"a group names {named[0]} but does not say split=True; only split groups have one")
    return group


def refuse_misspelt(group: Mapping[str, Any], options: Set[str]) -> None:
    """Raise a ValueError if a key of a new group is none of an optimizer's options, but reads like one."""
    for key in group.keys() - options - Group.__annotations__.keys():
        if near := difflib.get_close_matches(str(key).lower(), options, n=1, cutoff=0.85):
            raise ValueError(f"a group has the key {key!r}; did you mean {near[0]!r}?")


def refuse_foreign(given: Mapping[str, Any]) -> None:
    """Raise a ValueError if an option that Frugal does not have is on."""
    for name in _FOREIGN:
        if given.get(name):
            raise ValueError(f"{name} is {given[name]!r}, which Frugal does not have; leave it out")


def begin_clocks(group: Group, steps: int = 0) -> None:
    """Set all counts of a group as they are before its first step, of which so many others are behind it."""
    if group["split"]:
        group |= Group(since_refresh=0, refreshes=0, handed_out=0, density_read=0.0, waiting=[], bases_kept=0)
    group |= {"steps": steps, "skipped_steps": 0}


def parameter_names(group: Group) -> list[str]:
    """Return the names of a group's parameters, for messages."""
    return group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]


def check(group: Group) -> None:
    """Convert a new group's options to plain values and objects; raise a ValueError if one is out of range or unfit."""
    given = cast(dict[str, Any], group)
    for name in given.keys() & Group.__annotations__.keys() - {"params", "param_names"}:
        given[name] = as_plain(given[name])
    steps = group.setdefault("steps", 0)
    refuse("steps", steps, None if type(steps) is int and steps >= 0 else "a whole number, 0 or more")
    for name, param in zip(parameter_names(group), group["params"], strict=True):
        if param.is_complex():
            what = f"parameter {name} is {str(param.dtype).removeprefix('torch.')}; Frugal updates real numbers"
            raise ValueError(f"{what}: make the parameter real, and view it with torch.view_as_complex")
    given["betas"] = tuple(group["betas"])
    for name in (*choices.RANGES, *choices.NAMES):
        refuse(name, given[name], choices.allowed(name, given[name]))
    group["fused"] = group["fused"] is None or bool(group["fused"])
    if group["state_on"] != "device" and any(map(shards.is_sharded, group["params"])):
        refuse("state_on", group["state_on"], "device with sharded parameters")
    if group["capturable"]:
        _check_capturable(group)
    if group["split"]:
        settle(group)
        if group["density"] == controls.Constant(0) and group["state_free"].sees == "nothing":
            what = "density is 0 and state_free is 'none', so that nothing of a group would be trained"
            raise ValueError(f"{what}: leave its parameters out, or set another value of either")
        stagger = group["stagger"]
        refuse("stagger", stagger, choices.allowed_stagger(stagger, group["subspace"].kind, group["interval"]))


def _check_capturable(group: Group) -> None:
    repeats = "repeat the noise of one step"
    found = {
        "stochastic_rounding": repeats if group["stochastic_rounding"] else None,
        "state_dtype int8": repeats if group["state_dtype"] == "int8" else None,
        "state_on cpu_always_full": None if group["state_on"] == "device" else "not copy moments to the GPU",
        "nonfinite": "repeat the decision of one step" if group["nonfinite"] else None,
    }
    for name, what in found.items():
        if what:
            raise ValueError(f"capturable with {name}: a CUDA graph would {what}; set one of the two")


def refuse(name: str, value: Any, allowed: str | None) -> None:
    """Raise a ValueError about an option's value if `allowed` says what else is allowed."""
    if allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed.replace('null', 'None')}")


def settle(group: Group) -> None:
    """Convert controls, subspace and state-free rule to objects; check that the group's options go together.

    Raises:
        ValueError: they do not; the group is as before.
    """
    density, interval = controls.density(group["density"]), controls.interval(group["interval"])
    subspace, rule = as_subspace(group["subspace"]), as_state_free(group["state_free"])
    policies = choices.POLICIES.get(subspace.kind, choices.NAMES["on_refresh"])
    if group["on_refresh"] not in policies:
        refuse(f"on_refresh with {subspace.kind}", group["on_refresh"], ", ".join(map(str, policies)))
    if "layers" in group and len(group["layers"]) != len(group["params"]):
        raise ValueError(f"layers has {len(group['layers'])} numbers for {len(group['params'])} parameters")
    if interval.keeps_gradients:  # another may be shorter than `stagger`, once it is reassigned
        refuse("stagger", group["stagger"], choices.allowed_stagger(group["stagger"], subspace.kind, interval))
    for name, param in zip(parameter_names(group), group["params"], strict=True):
        _check_rule(name, param, rule)
        if density != controls.Constant(0):  # else nothing is ever selected
            _check_parameter(name, param, subspace)
    group |= Group(density=density, interval=interval, subspace=subspace, state_free=rule)


def resettled(group: Group, before: Sequence[Any] | None) -> Sequence[Any]:
    """Return a group's subspace, controls and rule; settle it unless they are the objects that they were `before`.

    Args:
        group: to look at.
        before: what this returned for it last; None for a group that it has not seen, such as a copy's.

    Raises:
        ValueError: the subspace is another one, or the group's options do not go together.
    """
    parts = _parts(group)
    if before is not None and all(map(operator.is_, parts, before)):
        return parts
    if not (isinstance(parts[0], Subspace) if before is None else parts[0] is before[0]):
        raise ValueError(f"the subspace cannot be changed to {parts[0]!r}; make a new optimizer")
    settle(group)
    return _parts(group)


def _parts(group: Group) -> Sequence[Any]:
    return group["subspace"], group["density"], group["interval"], group["state_free"]


def _check_rule(name: str, param: Tensor, rule: StateFree) -> None:
    seen = {"matrix": "a whole matrix"}.get(rule.sees, f"whole {rule.sees}")
    if not rule.by_entry and param.ndim != 2:
        raise ValueError(
            f"parameter {name} has shape {tuple(param.shape)}, and the state-free rule {rule.kind} sees {seen}; "
            "allowed: matrices, or a rule that sees entries, such as signsgd"
        )
    if not rule.by_entry:
        _check_layout(name, param)


def _check_parameter(name: str, param: Tensor, subspace: Subspace) -> None:
    if shards.is_sharded(param):
        if not choices.works_on_shards(subspace.kind, subspace.settings()):
            given = f"parameter {name} is sharded over processes and the subspace is {subspace.settings()}"
            raise ValueError(f"{given}, which needs whole matrices; allowed: {choices.ON_SHARDS}")
        _check_layout(name, param)
    if param.ndim != 2 and not subspace.any_shape:
        raise ValueError(
            f"parameter {name} of a split group has shape {tuple(param.shape)}; {subspace.kind} splits only "
            "matrices: put it into a group without split=True, or choose blocks, which split any shape"
        )


def _check_layout(name: str, param: Tensor) -> None:
    if not shards.is_split_by_rows(param):
        allowed = "along its first axis, over one dimension of the mesh"
        raise ValueError(f"parameter {name} is sharded as {shards.layout(param)[1]}; allowed: {allowed}")


def lost(group: Group) -> Iterable[str]:
    """Yield warnings about updates that a group loses: in rounding to the nearest, or since directions are zeros."""
    for name, param in zip(parameter_names(group), group["params"], strict=True) if group["split"] else ():
        rule = group["state_free"]
        if param.ndim == 2 and param.shape[1] < rule.fewest_columns:
            needed = f"{rule.kind} trains no matrix of under {rule.fewest_columns} columns"
            yield f"parameter {name} has shape {tuple(param.shape)}, and {needed}: put it where nothing is split"
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
            "moments in bfloat16, rounded to the nearest, cannot decrease when 1 − β is below about 1/512 (β₂ = 0.999):"
            " set stochastic_rounding=True"
        )
