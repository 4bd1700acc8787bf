"""FRUGAL and AdaFRUGAL as one composed optimizer.

Which entries keep state is the subspace's answer, how many the density's (ρ), for how long the interval's (T); what
updates them are the rules. This file composes the four; `turns` minds when and how a subspace moves,
`tensor_state` what is kept of one tensor.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from adafrugal.optim import controls, gradients, kernels, options, refresh, rules
from adafrugal.optim import state as tensor_state
from adafrugal.optim import state_dict as saved_state
from adafrugal.optim.accounting import StateBytes, state_bytes
from adafrugal.optim.controls import Control
from adafrugal.optim.kernels import Full
from adafrugal.optim.rounding import Rounding
from adafrugal.optim.rules import Rates
from adafrugal.optim.sharding import shards
from adafrugal.optim.sharding.shards import local
from adafrugal.optim.subspaces import Free, Selection, Subspace

_OF_SPLIT_GROUPS = (
    "density", "interval", "subspace", "shrink", "stagger", "split_lr_scale", "state_free", "state_free_lr_scale",
    "on_refresh", "compile",
)  # fmt: skip


class Frugal(torch.optim.Optimizer):
    """AdamW for a share ρ of the entries of split matrices, signSGD for the rest, AdamW for all other tensors.

    FRUGAL (arXiv 2411.07837) with constant ρ and T; AdaFRUGAL (arXiv 2601.11568) where both move; other methods with
    other parts. For a split matrix W with gradient G: `W ← W(1 − lr·λ)`, then on the subspace the state-full rule
    with `lr·s`, elsewhere the state-free rule with `lr·s·c`. The subspace is chosen anew before the updates of the
    first step and whenever T steps have passed; what `on_refresh` says then happens to its moments. A tensor without
    a gradient is skipped, decay included.

    A group is split when it says `split=True` (`split_parameters` makes such groups); with `density=0` it is
    permanently state-free. Every argument below but `nonfinite` is a default that a group may override.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr: learning rate η.
        betas: Adam's or Lion's (β₁, β₂); β₁ is the momentum of "sgdm".
        eps: Adam's ε.
        weight_decay: λ, decoupled.
        density: ρ: a number, a mapping `{"kind": …}` or a control such as `LinearDecay(0.25, 0.05, steps=10_000)`.
        interval: T: likewise, such as `LossAware(100, 1000)`.
        subspace: a name ("blocks", "columns", "rows", "slab", "randk", "randperm", "svd", "random"), a mapping
            `{"kind": …}` or a `Subspace`.
        state_full: "adamw", "lion" or "sgdm"; for the subspace and for groups that are not split.
        state_free: "signsgd", "sgd" or "none".
        split_lr_scale: s, the split matrices' share of the learning rate.
        state_free_lr_scale: c, on top of s, for the entries without state.
        on_refresh: what becomes of moments and step counts. "reset": those of the split matrices begin anew;
            "reset_all": those of every tensor do; "keep": they stay, in order, for whatever is selected now (GaLore);
            "keep_overlap": entries that stay selected keep theirs, all others begin anew (from then on each column,
            row or entry has a step count of its own, and AdamW its plain form).
        shrink: whether a falling ρ gives up part of the subspace "immediately" (the rest keeps its moments) or only
            "at_refresh".
        stagger: over how many steps a refresh is spread, so that none of them takes all of its time; at most T, and
            not for blocks. The first refresh is never spread.
        state_dtype: of the moments: "float32" or "bfloat16"; None is float32, and float64 for float64 parameters.
        stochastic_rounding: of what is stored in bfloat16, weights and moments.
        nonfinite: what to do about a gradient that is not finite: "error", "skip" (the whole step, clocks included;
            `skipped_steps` counts them) or None, not to look: looking reads all gradients once more and, on a GPU,
            waits for them; processes that share parameters then tell each other at every step.
        fused: use torch's fused AdamW kernel. With `fused=False, compile=False` every update is plain torch, one
            tensor after the other, and agrees with torch's own plain AdamW bit for bit.
        compile: compile the state-free update with torch.compile; None: for groups of 16.8 million entries or more
            on a CPU.
        seed: of the random choices; torch's global generator is never used.

    Raises:
        ValueError: a rate, control or subspace outside its range, or parts that do not go together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float | Mapping[str, Any] | controls.Control = 0.25,
        interval: int | Mapping[str, Any] | controls.Control = 200,
        subspace: str | Mapping[str, Any] | Subspace = "blocks",
        state_full: str = "adamw",
        state_free: str = "signsgd",
        split_lr_scale: float = 1.0,
        state_free_lr_scale: float = 1.0,
        on_refresh: str = "reset",
        shrink: options.Shrink = "immediately",
        stagger: int = 1,
        state_dtype: options.StateDtype | None = None,
        stochastic_rounding: bool = False,
        nonfinite: options.Nonfinite | None = None,
        fused: bool = True,
        compile: bool | None = None,
        seed: int = 0,
    ) -> None:
        if nonfinite not in (None, *get_args(options.Nonfinite)):
            raise ValueError(f"nonfinite is {nonfinite!r}; allowed: {', '.join(get_args(options.Nonfinite))} or None")
        self._refresh_hooks: OrderedDict[int, Callable[[refresh.Refresh], None]] = OrderedDict()
        self._changes: dict[tuple[int, str], dict[str, Any]] | None = None  # of the step that is under way
        self._bytes_before: int | None = None
        params = [dict(p) if isinstance(p, dict) else p for p in params]  # torch writes into the groups it is given
        defaults = {
            "split": False, "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "density": density, "interval": interval, "subspace": subspace, "state_full": state_full,
            "state_free": state_free, "split_lr_scale": split_lr_scale, "state_free_lr_scale": state_free_lr_scale,
            "on_refresh": on_refresh, "shrink": shrink, "stagger": stagger, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "fused": fused, "compile": compile, "seed": seed,
            "nonfinite": nonfinite,
        }  # fmt: skip
        super().__init__(params, defaults)
        if not self._split_groups():
            warnings.warn("no group says split=True: this Frugal splits nothing; see split_parameters", stacklevel=2)
        for lost in dict.fromkeys(what for group in self.param_groups for what in options.lost_in_rounding(group)):
            warnings.warn(lost, stacklevel=2)

    # -- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; a split one starts with a refresh at the next step."""
        param_group = dict(param_group)  # torch writes the defaults into it
        named = [key for key in _OF_SPLIT_GROUPS if key in param_group]
        if "nonfinite" in param_group:
            raise ValueError("a group names nonfinite, which concerns whole steps: give it to the optimizer")
        if named and not param_group.get("split", self.defaults["split"]):
            raise ValueError(f"a group names {named[0]} but does not say split=True; only split groups have one")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["shapes"] = [list(p.shape) for p in group["params"]]
        group["first"] = sum(len(g["params"]) for g in self.param_groups[:-1])
        try:
            options.check_group(group)
            if group["split"]:
                options.settle(group)
                if group["stagger"] > group["interval"].at(1):
                    raise ValueError(f"stagger is {group['stagger']}, above the interval ({group['interval'].at(1)})")
                group |= refresh.new_clocks()
        except Exception:
            del self.param_groups[-1]
            raise
        if not group["split"]:
            for key in _OF_SPLIT_GROUPS:
                del group[key]
        del group["nonfinite"]
        group |= {"steps": 0, "skipped_steps": 0}

    def _split_groups(self) -> list[dict[str, Any]]:
        """The groups that are split; what somebody assigned to one since the last step is taken up."""
        groups = [group for group in self.param_groups if group["split"]]
        for group in groups:
            if not (isinstance(group["density"], Control) and isinstance(group["interval"], Control)):
                options.settle(group)
            if not isinstance(group["subspace"], Subspace):
                raise ValueError(f"the subspace cannot be changed to {group['subspace']!r}; make a new optimizer")
        return groups

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every tensor that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._changes is None:
            if not self._gradients_are_sound():
                for group in self.param_groups:
                    group["skipped_steps"] += 1
                return loss
            self._begin_step()
        try:
            for group in self.param_groups:
                self._update(group)
        finally:
            changes, self._changes = self._changes, None
        if changes and self._refresh_hooks:
            after = self.state_bytes().total
            for change in changes.values():
                for hook in self._refresh_hooks.values():
                    hook(refresh.Refresh(**change, bytes_after=after))
        return loss

    @torch.no_grad()
    def update_one(self, param: Tensor) -> None:
        """Make this step for the tensors that have a gradient now, of which `param` is one; `step` ends it.

        What `UpdateInBackward` calls, when `param` alone has one. A subspace that needs gradients is chosen here.
        """
        gradients.refuse_sparse([param])
        if self._changes is None:
            self._begin_step()
        index = next(i for i, group in enumerate(self.param_groups) if any(p is param for p in group["params"]))
        group = self.param_groups[index]
        for due in refresh.arrived(group) if group["split"] else ():
            self._carry_out(index, due)
        self._update(group)

    @torch.no_grad()
    def rehearse(self) -> None:
        """Do all of a step but the updates: clocks and subspaces move, and moments begin as zeros."""
        self._begin_step()
        self._changes = None
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if param.grad is None or (group["split"] and not state.get("entries")) or "step" in state:
                    continue
                chosen = refresh.selection_here(param, state, group)
                self._regions(local(param), local(param.grad), state, group, chosen)
                for name in rules.STATE_FULL[group["state_full"]].moments:
                    state[name] = state[name].to(tensor_state.state_dtype(param, group))

    def refuse_single_updates(self) -> None:
        """Refuse `update_one` where a step has to see all gradients first.

        Raises:
            ValueError: which setting does so, and what to set.
        """
        if self.defaults["nonfinite"] is not None:
            given = f"nonfinite is {self.defaults['nonfinite']!r}"
            raise ValueError(f"{given}, which looks at all gradients before the first update: set it to None")

    def _begin_step(self) -> None:
        """Move the clocks by one step, and the subspaces as far as the gradients that are there allow."""
        for group in self.param_groups:
            group["steps"] += 1
        self._changes, self._bytes_before = {}, None
        try:
            self._move_subspaces()
        except ValueError:  # of a control or a subspace; the step has not begun
            self._changes = None
            raise

    def _gradients_are_sound(self) -> bool:
        """False where this step is to be skipped; raises where it cannot be made, before anything is changed."""
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        gradients.refuse_sparse(params)
        if self.defaults["nonfinite"] is None or gradients.are_finite(params):
            return True
        if self.defaults["nonfinite"] == "error":
            name, step = gradients.first_nonfinite(self.param_groups), self.param_groups[0]["steps"] + 1
            raise FloatingPointError(
                f"the gradient of parameter {name} is not finite at step {step}; "
                "nothing was changed (nonfinite='skip' would go on without this step)"
            )
        return False

    def _move_subspaces(self) -> None:
        """Move every split group's clock by one step, and its subspace where that is due."""
        self._split_groups()
        split = ((index, group) for index, group in enumerate(self.param_groups) if group["split"])
        for index, due in [(index, due) for index, group in split for due in refresh.advance(group, self.state)]:
            if due.event == "refresh" and self.param_groups[index]["on_refresh"] == "reset_all":
                for other in self.param_groups:
                    refresh.forget_all(other, self.state)
            self._carry_out(index, due)

    def _carry_out(self, index: int, due: refresh.Due) -> None:
        """Do what is due in a group, and note it; what a refresh chooses late is a part of it."""
        if self._bytes_before is None and self._refresh_hooks:
            self._bytes_before = self.state_bytes().total
        group, started = self.param_groups[index], time.perf_counter()
        refresh.carry_out(due, group, self.state)
        key = (index, "refresh" if (index, "refresh") in self._changes else due.event)
        known = self._changes.setdefault(key, {
            "event": due.event, "step": self.param_groups[0]["steps"], "group": index,
            "density": group["density_read"], "interval": group["interval"].at(group["steps"]),
            "seconds": 0.0, "bytes_before": self._bytes_before or 0,
        })  # fmt: skip
        known["seconds"] += time.perf_counter() - started

    # -- updating -------------------------------------------------------------------------------------------------

    def _update(self, group: dict[str, Any]) -> None:
        """Update a group's tensors: together where rules work on them in place, else one after the other."""
        full: list[Full] = []
        free: list[list[Free]] = [[], []]  # by the part of the matrix, since parts share storage
        together = not group["split"] or group["subspace"].in_place
        for place, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            state, target, grad = self.state[param], local(param), local(param.grad)
            chosen = refresh.selection_here(param, state, group)
            if tensor_state.in_fewer_bits(target, group, state):
                noise = group["seed"], group["steps"], group["first"] + place, shards.here(param).first
                self._update_wide(target, grad, state, group, chosen, Rounding(group["stochastic_rounding"], *noise))
            elif not together and state.get("entries"):
                self._update_alone(target, grad, state, group, chosen)
            else:
                whole, parts = self._regions(target, grad, state, group, chosen)
                full += whole
                for which, part in enumerate(parts):
                    free[which].append(part)
        kernels.state_full(group["state_full"], full, Rates.state_full(group), fused=group["fused"])
        for parts in free if group["split"] else ():
            kernels.state_free(group["state_free"], parts, Rates.state_free(group), compiled=kernels.compiles(group))

    def _regions(
        self, target: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any], chosen: Selection
    ) -> tuple[list[Full], tuple[Free, ...]]:
        """What of one tensor the state-full rule updates, with its moments, and what the state-free rule does."""
        if not group["split"]:
            tensor_state.begin(state, grad, group)
            return [Full(target, grad, state)], ()
        if not state.get("entries"):
            return [], (Free(target, grad),)
        residual = group["state_free"] != "none"
        regions = group["subspace"].regions(target, grad, chosen, residual)
        tensor_state.begin(state, regions.full[1], group)
        return [Full(*regions.full, state)], regions.free

    def _update_alone(
        self, target: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any], chosen: Selection
    ) -> None:
        """Update one tensor, and let go of all copies that took."""
        full, free = self._regions(target, grad, state, group, chosen)
        kernels.state_full(group["state_full"], full, Rates.state_full(group), fused=group["fused"])
        if group["split"]:
            kernels.state_free(group["state_free"], free, Rates.state_free(group), compiled=kernels.compiles(group))
        if full and group["split"]:
            group["subspace"].close(target, full[0].target, chosen)

    def _update_wide(
        self, target: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any], chosen: Selection,
        rounding: Rounding,
    ) -> None:  # fmt: skip
        """Update one tensor in float32, where it or its moments are stored in fewer bits."""
        if chosen:
            self._update_copy(target, grad, state, group, chosen, rounding)
            return
        keeps = not group["split"] or state.get("entries")
        if keeps:
            tensor_state.begin(state, target, group, tensor_state.state_dtype(target, group))
        moments = [name for name in rules.STATE_FULL[group["state_full"]].moments if name in state]
        for rows in tensor_state.slices(target):  # each entry's update is its own: no need to copy the whole
            part = {**state, **{name: state[name][rows] for name in moments}}
            if keeps:
                part["step"] = state["step"].clone()
            self._update_copy(target[rows], grad[rows], part, group, chosen, rounding)
        if keeps:
            state["step"] = part["step"]

    def _update_copy(
        self, target: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any], chosen: Selection,
        rounding: Rounding,
    ) -> None:  # fmt: skip
        """Update float32 copies of a tensor and its moments, and store what comes of it."""
        dtype, kept_in = tensor_state.working_dtype(target), tensor_state.state_dtype(target, group)
        moments = rules.STATE_FULL[group["state_full"]].moments
        stored = {name: state[name] for name in moments if name in state}
        state |= {name: value.to(dtype) for name, value in stored.items()}
        wide = target.to(dtype, copy=True)
        self._update_alone(wide, grad.to(dtype), state, group, chosen)
        rounding.store(target, wide)
        for name in moments if kept_in != dtype and moments[0] in state else ():
            result = state[name]
            state[name] = stored.get(name, torch.empty_like(result, dtype=kept_in))
            rounding.store(state[name], result)

    # -- what can be read and observed ----------------------------------------------------------------------------

    def observe(self, loss: float) -> None:
        """Show a loss (nats per token) to every control that reads one. Every call counts.

        It is a validation loss, or a training loss averaged over the steps since the last call.
        """
        for group in self._split_groups():
            group["density"].observe(loss)
            group["interval"].observe(loss)

    @property
    def density(self) -> float:
        """ρ as last read, of the first split group that is not permanently state-free; 0 before the first step."""
        group = self._first_split_group()
        return group["density_read"] if group else 0.0

    @property
    def interval(self) -> int:
        """T in force, of the same group; 0 where nothing is split."""
        group = self._first_split_group()
        return group["interval"].at(group["steps"]) if group else 0

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite (`nonfinite="skip"`)."""
        return self.param_groups[0]["skipped_steps"]

    def _first_split_group(self) -> dict[str, Any] | None:
        groups = self._split_groups()
        moving = (group for group in groups if group["density"] != controls.Constant(0))
        return next(moving, groups[0] if groups else None)

    def selected_entries(self) -> int:
        """How many entries of split matrices keep state, by the subspaces' own count at the ρ last read.

        Matrices that have had no gradient since the last refresh are counted, though they hold no moments yet; those
        that wait for a gradient to choose by (svd) count as they were.
        """
        return sum(self.state[p].get("entries", 0) for group in self._split_groups() for p in group["params"])

    def state_bytes(self) -> StateBytes:
        """Bytes of state by parameter and role, counted from the tensors."""
        return state_bytes(self)

    def checksum(self) -> str:
        """A short digest of what every process must agree on, to be compared now and then.

        That is, of each split group, ρ as read, T, the numbers of steps and refreshes, and where each matrix's
        subspace lies: whether it is active, indices, first row and number of rows, the bytes of a basis. Weights and
        moments are not in it. It is the same on every process; and the same as of one process with whole tensors,
        but for svd and random, whose bases may differ in their last bits. Nothing is exchanged, but indices and bases
        are copied to the host.
        """
        digest = hashlib.blake2b(digest_size=8)
        for group in self._split_groups():
            for value in refresh.outline(group, self.state):
                digest.update(value if isinstance(value, bytes) else f"{value!r};".encode())
        return digest.hexdigest()

    def register_refresh_hook(self, hook: Callable[[refresh.Refresh], None]) -> RemovableHandle:
        """Call `hook(event)` after each step in which a subspace was chosen anew or shrunk; `.remove()` ends that."""
        handle = RemovableHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_hooks", OrderedDict())  # hooks do not travel with copies
        self._changes, self._bytes_before = None, None

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with controls and subspaces as plain numbers and strings; `weights_only=True` loads it.

        Moments of a sharded parameter are in it as DTensors of the whole, evenly divided by rows over the processes
        that share the parameter. For a slab those rows have to move, one matrix at a time: every process calls this,
        and `load_state_dict`.
        """
        self._split_groups()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if group["split"]:
                group["density"] = group["density"].state_dict()
                group["interval"] = group["interval"].state_dict()
                group["subspace"] = group["subspace"].settings()
        params = ((param, group) for group in self.param_groups for param in group["params"])
        numbers = (number for group in saved["param_groups"] for number in group["params"])
        for (param, group), number in zip(params, numbers, strict=True):
            if shards.is_sharded(param) and number in saved["state"]:
                saved["state"][number] = saved_state.shared(saved["state"][number], param, group)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state: groups, controls, clocks, subspace and moments.

        Values and dtypes come back as they were saved. (torch's own loading casts every state tensor to its
        parameter's dtype, which turns indices into floats and float32 moments into bfloat16.)

        Moments are whole: plain tensors, as one process saves them, or DTensors, as several do; whichever they are,
        this process takes what it keeps of them.

        Raises:
            ValueError: the state is of another optimizer, or of matrices of other shapes; nothing is changed then.
        """
        saved_state.refuse_other(state_dict, self.param_groups)
        before = self.param_groups
        final: dict[str, Any] = {}  # what is loaded after all hooks have had their say
        handle = self.register_load_state_dict_pre_hook(lambda _, given: final.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, old in zip(self.param_groups, before, strict=True):
            for key in old.keys() - group.keys():  # saved before there was such a setting
                group[key] = old[key]
            if group["split"]:
                group["density"] = controls.restored(group["density"], old["density"])
                group["interval"] = controls.restored(group["interval"], old["interval"])
                group["subspace"] = saved_state.restored_subspace(group["subspace"], old["subspace"])
        numbers = iter(n for group in final["param_groups"] for n in group["params"])
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] |= saved_state.kept(final["state"].get(next(numbers), {}), param, group)
