"""FRUGAL and AdaFRUGAL as one composed optimizer.

The subspace selects the entries that keep state, the density ρ sets how many, the interval T for how many steps; rules
update them. This file combines the four behind torch's interface; `refresh` moves subspaces, `updates` applies rules.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from adafrugal.optim import controls, displacement, gradients, options, refresh, updates
from adafrugal.optim.accounting import StateBytes, state_bytes
from adafrugal.optim.attempt import Attempt
from adafrugal.optim.controls import Control
from adafrugal.optim.kernels import tables
from adafrugal.optim.moves import Moves
from adafrugal.optim.options import Group, SplitOptions
from adafrugal.optim.refresh import Event, Refresh
from adafrugal.optim.state import complete_all
from adafrugal.optim.state_dict import SavedOptimizer
from adafrugal.optim.state_free import StateFree
from adafrugal.optim.subspaces import Subspace


class Frugal(SavedOptimizer):
    """AdamW for a share ρ of the entries of split matrices, signSGD for the rest, AdamW for all other tensors.

    Constant ρ and T give FRUGAL (arXiv 2411.07837), controls of both AdaFRUGAL (arXiv 2601.11568), other subspaces and
    rules other methods. For a split matrix W with gradient G: `W ← W(1 − lr·λ)`, then the state-full rule with `lr·s`
    on the subspace, the state-free rule with `lr·s·c` elsewhere. The subspace is selected before the updates of the
    first step, and again every T steps. A tensor without a gradient is skipped, decay included.

    A group with `split=True` is split (`split_parameters` makes such groups); with `density=0` it is permanently
    state-free. Every argument below except `nonfinite` is a default that a group may override. At least one group must
    say whether it is split: a trainer that makes the groups itself would get AdamW without a word.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr: learning rate η.
        betas: Adam's or Lion's (β₁, β₂); β₁ is the momentum of "sgdm".
        eps: Adam's ε.
        weight_decay: λ, decoupled.
        density: ρ: a number, a mapping `{"kind": …}` or a control such as `LinearDecay(0.25, 0.05, steps=10_000)`.
        density_scale: f, for groups that keep more or less state than others: `min(1, f·ρ)` of the group is selected.
            Of blocks it is that share of the group's own blocks, which take turns among themselves.
        interval: T: likewise, such as `LossAware(100, 1000)`.
        subspace: a name ("blocks", "columns", "rows", "slab", "randk", "randperm", "svd", "random"), a mapping
            `{"kind": …}` or a `Subspace`.
        state_full: "adamw", "lion" or "sgdm"; for the subspace and for groups that are not split.
        state_free: "signsgd", "sgd", "none", a mapping `{"kind": …}` or a `StateFree`.
        split_lr_scale: s, the split matrices' share of the learning rate.
        state_free_lr_scale: c, on top of s, for the entries without state.
        on_refresh: moments and step counts at a refresh. "reset": restart those of the split matrices; "reset_all":
            restart those of every tensor; "keep": keep them, in order, for the new selection (GaLore);
            "keep_overlap": keep those of entries that stay selected, restart all others (from then on each column,
            row or entry has its own step count, and on a CPU AdamW runs in its plain form).
        shrink: whether a falling ρ releases part of the subspace "immediately" (the rest keeps its moments) or only
            "at_refresh".
        stagger: the number of steps over which a refresh is spread; at most T; 1 for blocks and with `Displacement`.
            The first refresh is never spread.
        state_dtype: of the moments: "float32", "bfloat16" or "int8"; None: float32, and float64 for float64 parameters.
            "int8": of matrices of 4,096 entries or more, about a byte a moment (`eight_bits`), rounded stochastically
            at each step; the others' as with None.
        state_on: where moments lie: "device", that of the parameters; or "cpu_always_full", those of groups that are
            not split in the CPU's memory, from which an update on a GPU copies a slice at a time.
        stochastic_rounding: round weights and moments stored in bfloat16 stochastically.
        nonfinite: response to a NaN or infinite gradient: "error", "skip" (the whole step, clocks included;
            `skipped_steps` counts them) or None (no check). A check reads all gradients once more, makes the host
            wait for a GPU, and communicates at every step between processes that share parameters.
        fused: on a GPU, update a group in one launch of a Triton kernel; on a CPU, use torch's fused AdamW kernel. None
            is True. With `fused=False, compile=False` every update is plain torch, one tensor after the other, and
            agrees with torch's plain AdamW bit for bit.
        foreach: accepted as torch's optimizers do, without effect: `fused` decides.
        capturable: let `step` be recorded in a CUDA graph, to be replayed until the subspace moves (`can_replay`,
            `count_replay`). `lr` may be a tensor of one entry on the GPU, which each replay reads. For tensors and
            subspaces that are updated in one launch, thus not svd, random, randk, or rules that see more than entries.
        maximize: ascend: the updates with −G in place of G; moments are those of G.
        differentiable: accepted if False: steps are made outside autograd.
        compile: compile the state-free update on a CPU with torch.compile; None: for groups of 16.8 million entries
            or more.
        seed: of the random choices; torch's global generator is never used.

    Raises:
        ValueError: a rate, control or subspace is out of range, options do not go together, or no group says whether it
            is split.
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
        density_scale: float = 1.0,
        interval: int | Mapping[str, Any] | Control = 200,
        subspace: str | Mapping[str, Any] | Subspace = "blocks",
        state_full: str = "adamw",
        state_free: str | Mapping[str, Any] | StateFree = "signsgd",
        split_lr_scale: float = 1.0,
        state_free_lr_scale: float = 1.0,
        on_refresh: str = "reset",
        shrink: str = "immediately",
        stagger: int = 1,
        state_dtype: str | None = None,
        state_on: str = "device",
        stochastic_rounding: bool = False,
        nonfinite: str | None = None,
        fused: bool | None = True,
        foreach: bool | None = None,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        compile: bool | None = None,
        seed: int = 0,
    ) -> None:
        self._refresh_hooks: OrderedDict[int, Callable[[Refresh], None]] = OrderedDict()
        self._attempt = Attempt()
        self._launches: updates.Kept = {}
        self._products: displacement.Products = {}
        self._parts: dict[int, Sequence[Any]] = {}  # of split groups, by identity, as last checked
        self._moves = Moves()
        params = [dict(p) if isinstance(p, dict) else p for p in params]  # torch writes into the groups it is given
        options.refuse_foreign({"differentiable": differentiable})
        defaults = {
            "split": False, "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "density": density, "density_scale": density_scale, "interval": interval, "subspace": subspace,
            "state_full": state_full, "state_free": state_free, "split_lr_scale": split_lr_scale,
            "state_free_lr_scale": state_free_lr_scale,
            "on_refresh": on_refresh, "shrink": shrink, "stagger": stagger, "state_dtype": state_dtype,
            "state_on": state_on, "stochastic_rounding": stochastic_rounding, "fused": fused, "foreach": foreach,
            "capturable": capturable, "compile": compile, "seed": seed, "nonfinite": nonfinite, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults)
        if not any(isinstance(group, dict) and "split" in group for group in params):
            raise ValueError(
                "no group says split=True, so nothing would be split, as when a trainer makes the groups itself: give "
                "Frugal the groups of split_parameters(model) (docs/integrations.md), or say split=False in a group"
            )
        if not self._split_groups():
            warnings.warn("no group says split=True: this Frugal splits nothing; see split_parameters", stacklevel=2)
        for what in dict.fromkeys(what for group in self.param_groups for what in options.lost(group)):
            warnings.warn(what, stacklevel=2)

    # -- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; a split group is refreshed at the next step.

        Its controls count its own steps, unless it says how many are behind it, such as `"steps": 1000`.
        """
        super().add_param_group(options.prepared(param_group, self.defaults))
        group = self.param_groups[-1]
        group["shapes"] = [list(p.shape) for p in group["params"]]
        group["first"] = sum(len(g["params"]) for g in self.param_groups[:-1])
        try:
            options.check(group)
        except Exception:
            del self.param_groups[-1]
            raise
        given = cast(dict[str, Any], group)
        for key in ["nonfinite"] if group["split"] else ["nonfinite", *SplitOptions.__annotations__]:
            del given[key]
        options.begin_clocks(group, group["steps"])

    def _split_groups(self) -> list[Group]:
        """Return the split groups; convert and check a density, interval or rule reassigned since the last step."""
        groups = [group for group in self.param_groups if group["split"]]
        for group in groups:
            self._parts[id(group)] = options.resettled(group, self._parts.get(id(group)))
        return groups

    # -- the step -------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable imports the compiler at once
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every tensor that has a gradient; return the closure's loss, if one is given.

        A step that fails before its updates, such as in a refresh, has not been made: the next one makes it.

        Raises:
            RuntimeError: the step before failed amid its updates; load a saved state.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._attempt.whole(self.param_groups):
            if self._attempt.has_begun:  # in the backward pass
                for index in range(len(self.param_groups)):
                    self._select_arrived(index)
            else:
                if gradients.are_of_no_step(self.param_groups):
                    self._begin_state()
                    return loss
                if not gradients.are_sound(self.param_groups, self.defaults["nonfinite"]):
                    for group in self.param_groups:
                        group["skipped_steps"] += 1
                    return loss
                self._begin_step()
            for group in self.param_groups:
                self._update(group, gradients.places(group))
            self._moves.end()
            self._end_period()
            events = self._attempt.end()
        after = self.state_bytes().total if events and self._refresh_hooks else 0
        for event in events:
            for hook in self._refresh_hooks.values():
                hook(replace(event, bytes_after=after))
        return loss

    def _update(self, group: Group, places: Sequence[int]) -> None:
        """Update the tensors of a group at some places, which have gradients."""
        displacement.note(group, places, self.state, self._products)
        with self._moves.beside(group, places):
            updates.update(group, places, self.state, self._launches)

    def _end_period(self) -> None:
        """Let intervals that read gradients decide whether the next step selects anew."""
        for group in self.param_groups:
            displacement.decide(group, self._products)
        self._products.clear()

    def can_replay(self) -> bool:
        """Return whether the next step may be recorded in a CUDA graph, or be a replay of the step before.

        It may if that was updated in launches, and nothing is to be selected, released or loaded since.
        """
        return bool(self._launches) and not any(refresh.moves_next(g, self.state) for g in self._split_groups())

    def count_replay(self) -> None:
        """Advance the clocks by a step that the replay of a CUDA graph made (`capturable`).

        Raises:
            RuntimeError: the step should not have been a replay.
        """
        if not self.can_replay():
            raise RuntimeError("a CUDA graph was replayed at a step that differs; ask can_replay() before")
        with self._attempt.whole(self.param_groups):
            self._begin_step()
            self._attempt.end()

    def _update_one(self, index: int, place: int) -> None:
        """Update the tensor at a place of a group, whose gradient is complete; `step` ends the step.

        For `UpdateInBackward`. A subspace that needs gradients is selected here.
        """
        group = self.param_groups[index]
        gradients.refuse_sparse([group["params"][place]])
        with self._attempt.whole(self.param_groups):
            if not self._attempt.has_begun:
                self._begin_step()
            self._select_arrived(index)
            self._update(group, [place])

    def _select_arrived(self, index: int) -> None:
        """Let matrices of a group select by gradients that have come since the step began."""
        group = self.param_groups[index]
        for event, places in refresh.arrived(group) if group["split"] else ():
            self._move_subspace(index, event, places)

    def _rehearse(self) -> None:
        """Run a step without its updates: advance clocks, move subspaces, initialise moments to zeros."""
        with self._attempt.whole(self.param_groups):
            self._begin_step()
            for group in self.param_groups:
                updates.begin_moments(group, self.state)
                displacement.note(group, gradients.places(group), self.state, self._products)
            self._attempt.end()

    def _begin_state(self) -> None:
        """Give each state its keys, and tensors that are not split their moments, as the first step would."""
        complete_all(self.state, self.param_groups)
        for group in self.param_groups:
            updates.begin_moments(group, self.state)

    def _begin_step(self) -> None:
        """Advance the clocks by one step; move the subspaces as far as the present gradients allow."""
        for group in self.param_groups if tables.is_recording() else ():
            updates.check_recording(group)
        if len(self.state) < sum(len(group["params"]) for group in self.param_groups):
            complete_all(self.state, self.param_groups)
        for group in self.param_groups:
            group["steps"] += 1
        self._split_groups()
        split = [(index, group) for index, group in enumerate(self.param_groups) if group["split"]]
        due = [(index, *event) for index, group in split for event in refresh.advance(group, self.state)]
        if due:
            tables.refuse_to_record("its subspace moves; ask can_replay() before")
        for index, event, places in due:
            if event == "refresh":
                self._attempt.refreshed.add(index)
                self.param_groups[index]["interval"].begin_period()
                if self.param_groups[index]["on_refresh"] == "reset_all":
                    for other in self.param_groups:
                        refresh.forget_all(other, self.state)
            self._move_subspace(index, event, places)
        if due:  # so that a lack of memory shows before any tensor is updated
            for group in self.param_groups:
                updates.begin_moments(group, self.state)
        self._attempt.has_begun = True

    def _move_subspace(self, index: int, event: Event, places: list[int]) -> None:
        """Refresh or shrink matrices of a group; record and time it."""
        group, events = self.param_groups[index], self._attempt.events
        self._launches.clear()
        if not events:
            self._bytes_before = self.state_bytes().total if self._refresh_hooks else 0
        step, interval = self.param_groups[0]["steps"], int(group["interval"].at(group["steps"]))
        new = Refresh(event, step, index, group["density_read"], interval, 0.0, self._bytes_before, 0)
        known, started = events.setdefault((index, event), new), time.perf_counter()
        (refresh.shrink if event == "shrink" else refresh.refresh)(group, places, self.state)
        events[index, event] = replace(known, seconds=known.seconds + time.perf_counter() - started)

    # -- reading and observing ------------------------------------------------------------------------------------

    def observe(self, loss: float) -> None:
        """Pass a validation loss, or a training loss averaged since the last call, to every control (nats per token).

        Every call counts as one observation.
        """
        for group in self._split_groups():
            group["density"].observe(loss)
            group["interval"].observe(loss)

    @property
    def density(self) -> float:
        """ρ as last read, from the first split group that is not permanently state-free; 0 before the first step."""
        group = self._first_split_group()
        return group["density_read"] if group else 0.0

    @property
    def interval(self) -> int:
        """Current T, from the same group; 0 if no group is split."""
        group = self._first_split_group()
        return int(group["interval"].at(group["steps"])) if group else 0

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because a gradient was not finite (`nonfinite="skip"`)."""
        return self.param_groups[0]["skipped_steps"]

    def _first_split_group(self) -> Group | None:
        groups = self._split_groups()
        return next((group for group in groups if group["density"] != controls.Constant(0)), next(iter(groups), None))

    def selected_entries(self) -> int:
        """Return the number of entries of split matrices that keep state, as subspaces count at the ρ last read.

        Matrices without a gradient since the last refresh count, although they hold no moments yet. Matrices that
        wait for a gradient to select by (svd) count as before.
        """
        return sum(self.state.get(p, {}).get("entries", 0) for group in self._split_groups() for p in group["params"])

    def state_bytes(self) -> StateBytes:
        """Count the bytes of state tensors by parameter and role."""
        return state_bytes(self)

    def checksum(self) -> str:
        """Return a short digest of the values that must agree on all processes, to compare them now and then.

        It covers each split group's ρ as read, T and clocks, and each matrix's selection, but no weights or moments.
        One process with whole tensors has the same digest, except for svd and random, whose bases may differ in their
        last bits. It needs no communication, but copies indices and bases to the host.
        """
        digest = hashlib.blake2b(digest_size=8)
        for group in self._split_groups():
            for value in refresh.outline(group, self.state):
                digest.update(value if isinstance(value, bytes) else f"{value!r};".encode())
        return digest.hexdigest()

    def register_refresh_hook(self, hook: Callable[[Refresh], None]) -> RemovableHandle:
        """Call `hook(event)` after each step for each group's refresh or shrink, until the handle's `.remove()`."""
        handle = RemovableHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_hooks", OrderedDict())  # copies have no hooks
        self._attempt, self._launches, self._products, self._parts = Attempt(), {}, {}, {}
        self._split_groups()
        self.__dict__.setdefault("_moves", Moves()).end()  # what a failed step has begun
