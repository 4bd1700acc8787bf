"""Saved states: check that one fits an optimizer, divide it over processes, make it whole.

The functions below the class do not change the optimizer, so that a state is refused before anything is loaded.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from adafrugal.optim import choices, controls, options, storage
from adafrugal.optim.ambient import apart
from adafrugal.optim.attempt import Attempt
from adafrugal.optim.controls import Control
from adafrugal.optim.options import Group, parameter_names
from adafrugal.optim.rules import MOMENTS
from adafrugal.optim.sharding import shards
from adafrugal.optim.state import SCALES, complete, has_moments, selection
from adafrugal.optim.state_free import StateFree, state_free
from adafrugal.optim.subspaces import RowRange, Subspace
from adafrugal.optim.subspaces import subspace as as_subspace
from adafrugal.optim.values import as_plain

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # modules that torch puts around others


class SavedOptimizer(torch.optim.Optimizer):
    """Saving and loading of `Frugal`."""

    param_groups: list[Group]  # type: ignore[assignment]
    _attempt: Attempt

    def _split_groups(self) -> list[Group]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state_dict, with controls and subspaces as plain values, so that `weights_only=True` loads it.

        A parameter's state is tensors and numbers, always under the same keys: a tensor that does not exist at present
        is an empty one [0]. As in torch, tensors are not copied: copy them before the next step if they must stay.
        Moments of a sharded parameter are DTensors of the whole, divided evenly by rows over the processes that share
        it. A slab's rows move for this, one matrix at a time: every process must call this, and `load_state_dict`.
        """
        self._attempt.warn_of_failure()
        self._split_groups()
        handle = self.register_state_dict_post_hook(lambda _, saved: plain(saved, self.param_groups), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups, controls, clocks, subspaces and moments from a saved state.

        Values and dtypes are restored as saved. (torch's own loading casts every state tensor to its parameter's
        dtype, which turns indices into floats and float32 moments into bfloat16.) Moments are whole: plain tensors, as
        one process saves them, or DTensors, as several do; this process takes its part. Parameters are matched by
        `param_names` if the saved state and the optimizer have them, in each group, which then takes the saved order;
        else by place. Saved settings replace those given now; a warning lists the differences.

        Raises:
            ValueError: the state, after all load_state_dict pre-hooks, is of another optimizer, or of other names or
                shapes, or its settings do not suit these parameters; nothing has been changed.
        """
        differences: list[str] = []

        def fit(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            groups, state = fitted(given, self.param_groups)
            differences.extend(replaced(groups, self.param_groups, list(self.defaults)))
            for ours, group in zip(self.param_groups, groups, strict=True):
                ours["params"][:] = group["params"]
            packed = [{**g, "params": saved["params"]} for g, saved in zip(groups, given["param_groups"], strict=True)]
            return {**given, "state": state, "param_groups": packed}

        handle = self.register_load_state_dict_pre_hook(fit)
        try:
            with apart():  # a tensor made in inference mode could not change later
                super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if differences:
            what = f"the saved state replaces settings that were given: {'; '.join(differences)}"
            warnings.warn(what, stacklevel=2)

    def prepare_for_load(self, saved: Mapping[str, Any]) -> None:
        """Begin anew, with a state of zeros of a checkpoint's keys and sizes, for torch.distributed.checkpoint to fill.

        `dcp.load` reads into tensors that have the saved sizes, but those of a fresh optimizer differ when ρ has moved:

            reader = dcp.FileSystemReader(directory)
            optimizer.prepare_for_load(reader.read_metadata().state_dict_metadata)
            state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.load(state, storage_reader=reader)
            set_optimizer_state_dict(model, optimizer, state["optimizer"])

        Args:
            saved: `state_dict_metadata` of the checkpoint. Parameters are found by name in keys such as
                `optimizer.state.layers.0.weight.exp_avg`, nested or flat; or by number if it has no names.

        Raises:
            ValueError: the checkpoint has no state of these parameters; nothing has been changed.
        """
        state = defaultdict(dict, announced(saved, self.param_groups))
        self.__setstate__({"state": state, "param_groups": self.param_groups})
        for group in self.param_groups:
            options.begin_clocks(group)


# -- saving -----------------------------------------------------------------------------------------------------------


def plain(saved: Mapping[str, Any], groups: list[Group]) -> dict[str, Any]:
    """Return torch's state_dict with plain values for objects, every parameter's keys, and whole moments of shards."""
    state = dict(saved["state"])
    param_groups = []
    for group, packed in zip(groups, saved["param_groups"], strict=True):
        if group["split"]:
            packed = packed | {name: group[name].state_dict() for name in ("density", "interval")}
            packed |= {"subspace": group["subspace"].settings(), "state_free": group["state_free"].saved()}
        param_groups.append(packed)
        for param, number in zip(group["params"], packed["params"], strict=True):
            found = state[number] if number in state else complete({}, param, group)
            state[number] = _with_shared(found, param, group)
    return dict(as_plain({**saved, "state": state, "param_groups": param_groups}))


def _with_shared(state: Mapping[str, Any], param: Tensor, group: Group) -> dict[str, Any]:
    """Return a parameter's state, if it is sharded with row-wise tensors as DTensors of the whole."""
    if not (shards.is_sharded(param) and has_moments(state)):
        return dict(state)
    rows = _rows(state, param, group)
    return {
        name: shards.shared(value, param, rows)
        if _lies_by_rows(name, value, param, group) and not shards.is_sharded(value)
        else value
        for name, value in state.items()
    }


def _rows(state: Mapping[str, Any], param: Tensor, group: Group) -> RowRange:
    """Return the rows of a parameter that its whole moments cover."""
    chosen = selection(state, group)
    return group["subspace"].row_range(param.shape, chosen) if chosen else RowRange(0, param.shape[0])


def _lies_by_rows(name: str, value: Any, param: Tensor, group: Group) -> bool:
    """Return whether a value is a moment, its scales, the first gradient of a selection, or a step count a row."""
    if name in MOMENTS[group["state_full"]] or (name in ("first_grad", *SCALES.values()) and value.shape != (0,)):
        return True
    return name == "step" and value.ndim > 0 and group["subspace"].axis(param.shape) == 0


# -- loading ----------------------------------------------------------------------------------------------------------


def fitted(given: Mapping[str, Any], groups: list[Group]) -> tuple[list[Group], dict[Any, Any]]:
    """Return an optimizer's groups and states as a saved state has them.

    Parameters of a group are in the order of the saved group, if both have names.

    Raises:
        ValueError: the state is of another optimizer, of other names or shapes, or lacks something.
    """
    saved = given["param_groups"]
    if [group.get("split") for group in saved] != [group["split"] for group in groups]:
        _refuse_shapes(saved, groups)
    ours = [_in_saved_order(theirs, group) for theirs, group in zip(saved, groups, strict=True)]
    if [theirs.get("shapes") for theirs in saved] != [group["shapes"] for group in ours]:
        _refuse_shapes(saved, ours)
    merged = [_merged(theirs, group) for theirs, group in zip(saved, ours, strict=True)]
    keys: dict[Any, Any] = {}  # number or name in the saved state, by parameter
    for theirs, ordered, group in zip(saved, ours, groups, strict=True):
        # torch.distributed.checkpoint gives names, in the order of our group
        by_name = all(isinstance(key, str) for key in theirs["params"])
        keys |= zip((group if by_name else ordered)["params"], theirs["params"], strict=True)
    known = {*keys.values(), *map(str, keys.values())}
    state = {key: value for key, value in given["state"].items() if key not in known}
    for theirs, group in zip(saved, merged, strict=True):
        if theirs.get("steps") == 0:  # no state, so that accelerate can still exchange the parameters
            continue
        for place, (name, param) in enumerate(zip(parameter_names(group), group["params"], strict=True)):
            key = keys[param]
            found = given["state"].get(key, {}) | given["state"].get(str(key), {})  # dcp.load takes 0 for "0"
            _refuse_state(found, name, param, group, place)
            state[param] = complete(_kept_here(found, param, group), param, group)
    return merged, state


def _refuse_shapes(saved: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> None:
    theirs, mine = (
        "; ".join(f"{'split' if g.get('split') else 'not split'}, shapes {g.get('shapes')}" for g in found)
        for found in (saved, groups)
    )
    raise ValueError(
        f"the saved state is not this optimizer's: its groups are {theirs}, ours {mine}; "
        "make the optimizer over the same model's groups before loading"
    )


def _in_saved_order(theirs: Mapping[str, Any], ours: Group) -> Group:
    """Return our group with its parameters in the order of the saved one's names, if both have names."""
    if not (theirs.get("param_names") and ours.get("param_names")):
        return ours
    wanted, found = bare(theirs["param_names"]), bare(ours["param_names"])
    if set(wanted) != set(found) or len(wanted) != len(found):
        saved, here = ([n for n in one if n not in other] for one, other in ((wanted, found), (found, wanted)))
        raise ValueError(
            f"the saved state is of parameters with other names: only it has {', '.join(saved) or 'none'}; only this "
            f"optimizer has {', '.join(here) or 'none'}; rename those saved in a load_state_dict pre-hook, or leave "
            "out param_names to match by place"
        )
    order = [found.index(name) for name in wanted]
    ordered = {
        key: [ours[key][i] for i in order] for key in ("params", "param_names", "shapes", "layers") if key in ours
    }
    return cast(Group, {**ours, **ordered})


def bare(names: Sequence[str]) -> list[str]:
    """Return names of parameters without the modules that torch puts around others, if they stay different."""
    found = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
    if all(name.startswith("module.") for name in found):  # DistributedDataParallel's
        found = [name.removeprefix("module.") for name in found]
    return found if len(set(found)) == len(found) else list(names)


def _merged(theirs: Mapping[str, Any], ours: Group) -> Group:
    """Return the saved group over ours, with our parameters and their names, and controls and subspace as objects."""
    kept = {key: ours[key] for key in ("params", "param_names", "shapes", "layers") if key in ours}
    group = cast(Group, {**ours, **theirs, **kept})
    if group["split"]:
        if "density" in theirs:
            group["density"] = controls.restored(theirs["density"], ours["density"])
        if "interval" in theirs:
            group["interval"] = controls.restored(theirs["interval"], ours["interval"])
        if "subspace" in theirs:
            group["subspace"] = _restored_subspace(theirs["subspace"], ours["subspace"])
        if "state_free" in theirs:
            group["state_free"] = _restored_rule(theirs["state_free"], ours["state_free"])
        options.settle(group)
    return group


def _restored_subspace(settings: Mapping[str, Any], old: Subspace) -> Subspace:
    """Return the subspace of saved settings: a built-in one, or one of `old`'s class if the kinds agree."""
    if settings["kind"] != old.kind:
        return as_subspace(settings)
    return type(old)(**{key: value for key, value in settings.items() if key != "kind"})


def _restored_rule(saved: str | Mapping[str, Any], old: StateFree) -> StateFree:
    """Return the state-free rule of a saved state: a registered one, or one of `old`'s class if the kinds agree."""
    kind, settings = choices.described(saved)
    return type(old)(**settings) if kind == old.kind else state_free(saved)


def _refuse_state(saved: Mapping[str, Any], name: str, param: Tensor, group: Group, place: int) -> None:
    """Raise a ValueError if a parameter's saved state lacks something, or has moments of another shape."""
    needed: list[str] = []
    if group["split"] and group["refreshes"] and param.requires_grad and place not in group["waiting"]:
        needed = ["entries", *(group["subspace"].remembers if saved.get("entries") else ())]
    if has_moments(saved):
        needed += MOMENTS[group["state_full"]]
        needed += [SCALES[name] for name in storage.in_codes(saved, group)]
    lacking = [key for key in needed if not isinstance(saved.get(key), Tensor | int)]
    if lacking:
        raise ValueError(
            f"the saved state of parameter {name} lacks {', '.join(lacking)}; to read a checkpoint of "
            "torch.distributed.checkpoint, call prepare_for_load before"
        )
    chosen = selection(saved, group)
    expected = group["subspace"].compact(param.shape, chosen) if chosen else param.shape
    for key in MOMENTS[group["state_full"]] if has_moments(saved) else ():
        if saved[key].shape != expected:
            raise ValueError(
                f"the saved {key} of parameter {name} has shape {list(saved[key].shape)}; its whole has "
                f"{list(expected)}: load a state as state_dict gave it, not one process's part"
            )


def _kept_here(saved: Mapping[str, Any], param: Tensor, group: Group) -> dict[str, Any]:
    """Return this process's part of a parameter's saved state: copies, each on the device where it is read.

    What is neither a tensor nor a number is left out, such as the side of an svd, which older versions saved.
    """
    found = {name: value for name, value in saved.items() if isinstance(value, Tensor | int | float)}
    by_rows = shards.is_sharded(param) and has_moments(saved)
    for name, value in found.items():
        if isinstance(value, Tensor):
            if by_rows and _lies_by_rows(name, value, param, group):
                part = shards.own_part(value, param, _rows(saved, param, group))
            else:
                part = shards.whole(value)
            found[name] = storage.empty_like(name, part, param, group).copy_(part)
    return found


def replaced(loaded: list[Group], groups: list[Group], settings: Sequence[str]) -> list[str]:
    """Return, in words, each of these settings that differs between groups to load and those given."""
    found: dict[str, None] = {}
    for pair in zip(loaded, groups, strict=True):
        for key in (key for key in settings if all(key in group for group in pair)):
            saved, given = (_described(group, key) for group in pair)
            values = {key: (saved, given)}
            if isinstance(saved, dict) and saved["kind"] == given["kind"]:
                values = {f"{key}.{name}": (value, given[name]) for name, value in saved.items()}
            found |= {f"{name} {a} (given: {b})": None for name, (a, b) in values.items() if a != b}
    return list(found)


def _described(group: Mapping[str, Any], key: str) -> Any:
    """Return a setting in plain values, without what schedulers and observed losses make of it."""
    value = group[key]
    if isinstance(value, Control):
        return {"kind": value.kind} | {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    if isinstance(value, Subspace | StateFree):
        return value.settings()
    if key == "lr":
        return float(group.get("initial_lr", value))
    if key == "betas":
        return None if "max_momentum" in group else tuple(value)
    return value


# -- torch.distributed.checkpoint -------------------------------------------------------------------------------------


def announced(saved: Mapping[str, Any], groups: list[Group]) -> dict[Tensor, dict[str, Any]]:
    """Return states of zeros, with the keys and sizes that a checkpoint's metadata has for these parameters.

    Raises:
        ValueError: the checkpoint has no state of these parameters.
    """
    entries: dict[str, dict[str, Any]] = {}  # by the part of the key after "state", and by the state's name
    for key, entry in saved.items():
        parts = key.split(".")
        for i in (i for i, part in enumerate(parts) if part == "state"):
            entries.setdefault(".".join(parts[i + 1 : -1]), {})[parts[-1]] = entry
    found: dict[Tensor, dict[str, Any]] = {}
    for group in groups:
        names = bare(group.get("param_names") or [""] * len(group["params"]))
        for number, (name, param) in enumerate(zip(names, group["params"], strict=True), group["first"]):
            theirs = entries.get(name, entries.get(str(number), {}))
            found[param] = {
                key: _zeros(key, theirs[key], param, group) for key in complete({}, param, group) if key in theirs
            }
    if not any(found.values()):
        some = ", ".join(list(entries)[:3]) or "no parameter"
        raise ValueError(
            f"the checkpoint has the state of {some}, and of none of this optimizer's parameters; give it "
            "Metadata.state_dict_metadata, and make the groups with the model's names (split_parameters does)"
        )
    return found


def _zeros(key: str, entry: Any, param: Tensor, group: Group) -> Any:
    """Return zeros for a checkpoint's entry, sharded as `plain` shares them; 0 for a number."""
    size = getattr(entry, "size", None)
    if size is None:
        return 0
    made = torch.zeros(size, dtype=entry.properties.dtype, device="meta")
    if shards.is_sharded(param) and made.shape != (0,) and _lies_by_rows(key, made, param, group):
        from torch.distributed.tensor import zeros

        mesh, placements = shards.layout(param)
        return zeros(*size, dtype=made.dtype, device_mesh=mesh, placements=placements)
    return storage.empty_like(key, made, param, group).zero_()
