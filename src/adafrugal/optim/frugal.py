"""FRUGAL and AdaFRUGAL as one composed optimizer.

The subspace says which entries keep state, the density ρ how many, the interval T for how long; rules update them. This
file composes the four and keeps torch's contract; `refresh` moves subspaces, `updates` makes the updates.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from adafrugal.optim import controls, gradients, options, refresh, updates
from adafrugal.optim.accounting import StateBytes, state_bytes
from adafrugal.optim.controls import Control
from adafrugal.optim.options import Clocks, Group, SplitOptions
from adafrugal.optim.refresh import Event, Refresh, StepEvents
from adafrugal.optim.sharding.shards import is_sharded
from adafrugal.optim.state_dict import kept_here, refuse_other, restored_subspace, with_shared
from adafrugal.optim.subspaces import Subspace


class Frugal(torch.optim.Optimizer):
    """AdamW for a share ρ of the entries of split matrices, signSGD for the rest, AdamW for all other tensors.

    FRUGAL (arXiv 2411.07837) with constant ρ and T; AdaFRUGAL (arXiv 2601.11568) where both move; other methods with
    other parts. For a split matrix W with gradient G: `W ← W(1 − lr·λ)`, then on the subspace the state-full rule
    with `lr·s`, elsewhere the state-free rule with `lr·s·c`. The subspace is chosen before the updates of the first
    step, and anew whenever T steps have passed. A tensor without a gradient is skipped, decay included.

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
        on_refresh: moments and step counts at a refresh. "reset": those of the split matrices begin anew;
            "reset_all": those of every tensor do; "keep": they stay, in order, for the new selection (GaLore);
            "keep_overlap": entries that stay selected keep theirs, all others begin anew (from then on each column,
            row or entry has a step count of its own, and AdamW its plain form).
        shrink: whether a falling ρ gives up part of the subspace "immediately" (the rest keeps its moments) or only
            "at_refresh".
        stagger: the number of steps over which a refresh is spread; at most T, and 1 for blocks. The first refresh is
            never spread.
        state_dtype: of the moments: "float32" or "bfloat16"; None is float32, and float64 for float64 parameters.
        stochastic_rounding: of weights and moments that are stored in bfloat16.
        nonfinite: at a gradient that is not finite: "error", "skip" (the whole step, clocks included; `skipped_steps`
            counts them) or None, unchecked: a check reads all gradients once more, makes the host wait for a GPU, and
            processes that share parameters communicate at every step.
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
        density: float | Mapping[str, Any] | Control = 0.25,
        interval: int | Mapping[str, Any] | Control = 200,
        subspace: str | Mapping[str, Any] | Subspace = "blocks",
        state_full: str = "adamw",
        state_free: str = "signsgd",
        split_lr_scale: float = 1.0,
        state_free_lr_scale: float = 1.0,
        on_refresh: str = "reset",
        shrink: str = "immediately",
        stagger: int = 1,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
        nonfinite: str | None = None,
        fused: bool = True,
        compile: bool | None = None,
        seed: int = 0,
    ) -> None:
        self._refresh_hooks: OrderedDict[int, Callable[[Refresh], None]] = OrderedDict()
        self._events: StepEvents | None = None  # of the step under way
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
        named = [key for key in SplitOptions.__annotations__ if key in param_group]
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
                options.check_stagger(group)
        except Exception:
            del self.param_groups[-1]
            raise
        if group["split"]:
            group |= Clocks(since_refresh=0, refreshes=0, handed_out=0, density_read=0.0, waiting=[], bases_kept=0)
        else:
            for key in SplitOptions.__annotations__:
                del group[key]
        del group["nonfinite"]
        group |= {"steps": 0, "skipped_steps": 0}

    def _split_groups(self) -> list[Group]:
        """Return the split groups; convert a density or interval reassigned since the last step."""
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
        """Update every tensor that has a gradient; return the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._events is None:  # else the step began in the backward pass
            if not gradients.are_sound(self.param_groups, self.defaults["nonfinite"]):
                for group in self.param_groups:
                    group["skipped_steps"] += 1
                return loss
            self._begin_step()
        try:
            for group in self.param_groups:
                updates.update(group, self.state)
        finally:
            events, self._events = self._events, None
        events.report(self._refresh_hooks.values())
        return loss

    @torch.no_grad()
    def _update_one(self, param: Tensor) -> None:
        """Make this step for the only tensor that has a gradient now; `step` ends it. For `UpdateInBackward`.

        A subspace that needs gradients is chosen here.
        """
        gradients.refuse_sparse([param])
        if self._events is None:
            self._begin_step()
        index = next(i for i, group in enumerate(self.param_groups) if any(p is param for p in group["params"]))
        group = self.param_groups[index]
        for event, places in refresh.arrived(group) if group["split"] else ():
            self._move_subspace(index, event, places)
        updates.update(group, self.state)

    @torch.no_grad()
    def _rehearse(self) -> None:
        """Do all of a step but the updates: clocks and subspaces move, and moments begin as zeros."""
        self._begin_step()
        self._events = None
        for group in self.param_groups:
            updates.begin_moments(group, self.state)

    def _begin_step(self) -> None:
        """Move the clocks by one step, and the subspaces as far as the gradients present allow."""
        for group in self.param_groups:
            group["steps"] += 1
        self._events = StepEvents(lambda: self.state_bytes().total if self._refresh_hooks else 0)
        try:
            self._split_groups()
            split = [(index, group) for index, group in enumerate(self.param_groups) if group["split"]]
            due = [(index, group, *event) for index, group in split for event in refresh.advance(group, self.state)]
            for index, group, event, places in due:
                if event == "refresh" and group["on_refresh"] == "reset_all":
                    for other in self.param_groups:
                        refresh.forget_all(other, self.state)
                self._move_subspace(index, event, places)
        except ValueError:  # of a control or a subspace; the step has not begun
            self._events = None
            raise

    def _move_subspace(self, index: int, event: Event, places: list[int]) -> None:
        group = self.param_groups[index]
        with self._events.during(event, index, group, self.param_groups[0]["steps"]):
            (refresh.shrink if event == "shrink" else refresh.refresh)(group, places, self.state)

    # -- what can be read and observed ----------------------------------------------------------------------------

    def observe(self, loss: float) -> None:
        """Show every control a validation loss, or a training loss averaged since the last call (nats per token).

        Every call counts.
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
        """Steps skipped because a gradient was not finite (`nonfinite="skip"`)."""
        return self.param_groups[0]["skipped_steps"]

    def _first_split_group(self) -> Group | None:
        groups = self._split_groups()
        moving = (group for group in groups if group["density"] != controls.Constant(0))
        return next(moving, groups[0] if groups else None)

    def selected_entries(self) -> int:
        """The number of entries of split matrices that keep state, by the subspaces' own count at the ρ last read.

        It includes matrices without a gradient since the last refresh, which hold no moments yet; those that wait for
        a gradient to choose by (svd) count as before.
        """
        return sum(self.state[p].get("entries", 0) for group in self._split_groups() for p in group["params"])

    def state_bytes(self) -> StateBytes:
        """Bytes of state by parameter and role, counted from the tensors."""
        return state_bytes(self)

    def checksum(self) -> str:
        """A short digest of all that processes must agree on, to be compared now and then.

        That is, of each split group, ρ as read, T, the numbers of steps and refreshes, and each matrix's selection;
        weights and moments are not in it. One process with whole tensors has the same digest, but for svd and random,
        whose bases may differ in their last bits. Nothing is communicated; indices and bases are copied to the host.
        """
        digest = hashlib.blake2b(digest_size=8)
        for group in self._split_groups():
            for value in refresh.outline(group, self.state):
                digest.update(value if isinstance(value, bytes) else f"{value!r};".encode())
        return digest.hexdigest()

    def register_refresh_hook(self, hook: Callable[[Refresh], None]) -> RemovableHandle:
        """Call `hook(event)` after each step for each group's refresh or shrink; `.remove()` ends that."""
        handle = RemovableHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_hooks", OrderedDict())  # hooks do not travel with copies
        self._events = None

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with controls and subspaces as plain numbers and strings; `weights_only=True` loads it.

        Moments of a sharded parameter are DTensors of the whole, evenly divided by rows over the processes that share
        it. For a slab those rows have to move, one matrix at a time: every process calls this, and `load_state_dict`.
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
            if is_sharded(param) and number in saved["state"]:
                saved["state"][number] = with_shared(saved["state"][number], param, group)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state: groups, controls, clocks, subspace and moments.

        Values and dtypes come back as they were saved. (torch's own loading casts every state tensor to its
        parameter's dtype, which turns indices into floats and float32 moments into bfloat16.) Moments are whole: plain
        tensors, as one process saves them, or DTensors, as several do; this process takes its part.

        Raises:
            ValueError: the state is of another optimizer, or of matrices of other shapes; nothing is changed then.
        """
        refuse_other(state_dict, self.param_groups)
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
                group["subspace"] = restored_subspace(group["subspace"], old["subspace"])
        numbers = iter(n for group in final["param_groups"] for n in group["params"])
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] |= kept_here(final["state"].get(next(numbers), {}), param, group)
