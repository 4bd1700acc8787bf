"""FRUGAL and AdaFRUGAL as one composed optimizer.

Which entries keep state is the subspace's answer, how many the density's (ρ), for how long the interval's (T); what
updates them are the rules. This file is the bookkeeping between the four.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from adafrugal.optim import controls, rules
from adafrugal.optim.accounting import StateBytes, state_bytes
from adafrugal.optim.subspaces import Pair, Subspace, Turn
from adafrugal.optim.subspaces import subspace as as_subspace

Shrink = Literal["immediately", "at_refresh"]
_OF_SPLIT_GROUPS = ("density", "interval", "subspace", "shrink", "seed", "split_lr_scale", "state_free_lr_scale")
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what the state-full rule remembers for each entry


@dataclass(frozen=True)
class Refresh:
    """A new choice of the subspace, or its shrinking between two choices.

    Args:
        event: "refresh", or "shrink" where ρ fell between refreshes and part of the subspace was given up.
        step: the optimizer step at which it happened; the first is 1.
        group: the index of the parameter group.
        density, interval: ρ and T as read at this step.
        seconds: host time of the choice itself. Work that a GPU is still doing is not in it.
        bytes_before: all of the optimizer's state before the step.
        bytes_after: the same after the step.
    """

    event: Literal["refresh", "shrink"]
    step: int
    group: int
    density: float
    interval: int
    seconds: float
    bytes_before: int
    bytes_after: int


class Frugal(torch.optim.Optimizer):
    """AdamW for a share ρ of the entries of split matrices, signSGD for the rest, AdamW for all other tensors.

    FRUGAL (arXiv 2411.07837) with constant ρ and T; AdaFRUGAL (arXiv 2601.11568) where both move. For a split matrix
    W with gradient G: `W ← W(1 − lr·λ)`, then on the subspace the Adam update with `lr·s`, elsewhere
    `W ← W − lr·s·c·sign(G)`. The subspace is chosen anew before the updates of the first step and whenever T steps
    have passed; its moments and step counters then restart from zero, those of other tensors never do. A tensor
    without a gradient is skipped, decay included.

    A group is split when it says `split=True` (`split_parameters` makes such groups); its tensors must be matrices.
    Every argument below is a default that a group may override.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr: learning rate η.
        betas, eps: Adam's β₁, β₂ and ε.
        weight_decay: λ, decoupled.
        density: ρ: a number, a mapping `{"kind": …}` or a control such as `LinearDecay(0.25, 0.05, steps=10_000)`.
        interval: T: likewise, such as `LossAware(100, 1000)`.
        subspace: "blocks", "columns", a mapping `{"kind": …}` or a `Subspace`.
        split_lr_scale: s, the split matrices' share of the learning rate.
        state_free_lr_scale: c, on top of s, for the entries without state.
        shrink: whether a falling ρ gives up part of the subspace "immediately" (the rest keeps its moments) or only
            "at_refresh".
        seed: of the random choices; torch's global generator is never used.

    Raises:
        ValueError: a rate, control or subspace outside its range, or a split tensor that is not a matrix.
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
        split_lr_scale: float = 1.0,
        state_free_lr_scale: float = 1.0,
        shrink: Shrink = "immediately",
        seed: int = 0,
    ) -> None:
        self._refresh_hooks: OrderedDict[int, Callable[[Refresh], None]] = OrderedDict()
        params = [dict(p) if isinstance(p, dict) else p for p in params]  # torch writes into the groups it is given
        defaults = {
            "split": False, "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "density": density, "interval": interval, "subspace": subspace, "split_lr_scale": split_lr_scale,
            "state_free_lr_scale": state_free_lr_scale, "shrink": shrink, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)
        if not self._split_groups():
            warnings.warn("no group says split=True: this Frugal is AdamW; see split_parameters", stacklevel=2)

    # -- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; a split one starts with a refresh at the next step."""
        named = [key for key in _OF_SPLIT_GROUPS if key in param_group]
        if named and not param_group.get("split", self.defaults["split"]):
            raise ValueError(f"a group names {named[0]} but does not say split=True; only split groups have one")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_rates(group)
            if group["split"]:
                self._set_up(group)
        except Exception:
            del self.param_groups[-1]
            raise
        if not group["split"]:
            for key in _OF_SPLIT_GROUPS:
                del group[key]

    def _set_up(self, group: dict[str, Any]) -> None:
        """Give a split group controls and a subspace of its own, and its clocks."""
        _check_matrices(group)
        group["density"] = controls.density(group["density"])
        group["interval"] = controls.interval(group["interval"])
        group["subspace"] = as_subspace(group["subspace"])
        group["shapes"] = [list(p.shape) for p in group["params"]]
        group["first"] = sum(len(g["params"]) for g in self.param_groups[:-1])
        group |= {"steps": 0, "refreshes": 0, "since_refresh": 0, "handed_out": 0, "density_read": 0.0}

    def _split_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["split"]]

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every tensor that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        changes = self._move_subspaces()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        if changes and self._refresh_hooks:
            after = self.state_bytes().total
            for change in changes:
                for hook in self._refresh_hooks.values():
                    hook(Refresh(**change, bytes_after=after))
        return loss

    def _update(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Update one tensor by the rule, or the two rules, that its entries fall under."""
        grad, state, lr = param.grad, self.state[param], float(group["lr"])
        if grad.is_sparse:
            raise ValueError("Frugal takes no sparse gradients; make the embedding with sparse=False")
        rules.decay_(param, lr=lr, weight_decay=group["weight_decay"])
        if not group["split"]:
            self._state_full(param, grad, state, group, lr)
            return
        lr *= group["split_lr_scale"]
        free: tuple[Pair, ...] = ((param, grad),)
        if state["entries"]:
            selection = _selection(state, group)
            regions = group["subspace"].regions(param, grad, selection)
            self._state_full(*regions.full, state, group, lr)
            free = regions.free
        for target, direction in free:
            rules.signsgd_(target, direction, lr=lr * group["state_free_lr_scale"])
        if state["entries"]:
            group["subspace"].close(param, regions.full[0], selection)

    def _state_full(
        self, target: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any], lr: float
    ) -> None:
        """AdamW on a compact tensor; its moments begin, as zeros, with the first gradient."""
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        state["step"] += 1
        rules.adamw_(
            target, grad, *(state[name] for name in _MOMENTS),
            step=state["step"].item(), lr=lr, betas=group["betas"], eps=group["eps"],
        )  # fmt: skip

    # -- the subspace ---------------------------------------------------------------------------------------------

    def _move_subspaces(self) -> list[dict[str, Any]]:
        """Move every split group's clock by one step, and its subspace where that is due; tell what changed."""
        split = ((index, group) for index, group in enumerate(self.param_groups) if group["split"])
        due = [(index, group, event) for index, group in split if (event := self._due(group))]
        before = self.state_bytes().total if due and self._refresh_hooks else 0
        changes = []
        for index, group, event in due:
            started = time.perf_counter()
            self._refresh(group) if event == "refresh" else self._shrink(group)
            changes.append({
                "event": event, "step": group["steps"], "group": index,
                "density": group["density_read"], "interval": group["interval"].at(group["steps"]),
                "seconds": time.perf_counter() - started, "bytes_before": before,
            })  # fmt: skip
        return changes

    def _due(self, group: dict[str, Any]) -> Literal["refresh", "shrink"] | None:
        """Move a group's clock by one step and read ρ where it counts now; tell what has to follow."""
        group["steps"] += 1
        group["since_refresh"] += 1
        density = group["density"].at(group["steps"])
        if group["refreshes"] == 0 or group["since_refresh"] > group["interval"].at(group["steps"]):
            group["density_read"] = density
            return "refresh"
        if group["shrink"] == "immediately" and density < group["density_read"]:
            group["density_read"] = density
            counts = (group["subspace"].entries(p.shape, share) for p, share in self._shares(group))
            if any(n < self.state[p]["entries"] for n, p in zip(counts, group["params"], strict=True)):
                return "shrink"
        return None

    def _refresh(self, group: dict[str, Any]) -> None:
        """Choose the subspace anew. All old moments are let go before any new ones are taken."""
        old = {param: _selection(self.state[param], group) for param in group["params"]}
        group["handed_out"] += sum(bool(self.state[param].get("entries")) for param in group["params"])
        for param in group["params"]:
            self.state[param].clear()
        group["refreshes"] += 1
        group["since_refresh"] = 1
        subspace, turn = group["subspace"], _turn(group)
        for place, (param, share) in enumerate(self._shares(group)):
            state = self.state[param]
            state["entries"] = subspace.entries(param.shape, share)
            if state["entries"]:
                state |= subspace.select(param, param.grad, share, turn.generator(place), old[param])

    def _shrink(self, group: dict[str, Any]) -> None:
        """Give up what a lower density no longer covers; what remains keeps its moments."""
        subspace, turn = group["subspace"], _turn(group)
        for place, (param, share) in enumerate(self._shares(group)):
            state = self.state[param]
            entries = subspace.entries(param.shape, share)
            if entries >= state["entries"]:
                continue
            if entries:
                old = _selection(state, group)
                new = subspace.shrink(param.shape, share, turn.generator(place), old)
                kept = {name: subspace.narrow(state[name], old, new) for name in _MOMENTS if name in state}
                state |= new | kept
            else:
                state.clear()
            state["entries"] = entries

    def _shares(self, group: Mapping[str, Any]) -> list[tuple[Tensor, float]]:
        """Each matrix of a group with the share of it that the subspace selects at the ρ last read."""
        params = group["params"]
        names = group.get("param_names") or [str(group["first"] + i) for i in range(len(params))]
        matrices = [(name, p.shape) for name, p in zip(names, params, strict=True)]
        return list(zip(params, group["subspace"].shares(matrices, group["density_read"], _turn(group)), strict=True))

    # -- what can be read and observed ----------------------------------------------------------------------------

    def observe(self, loss: float) -> None:
        """Show a validation loss (nats per token) to every control that reads one. Every call counts."""
        for group in self._split_groups():
            group["density"].observe(loss)
            group["interval"].observe(loss)

    @property
    def density(self) -> float:
        """ρ as last read, of the first split group; 0 where there is none or before the first step."""
        groups = self._split_groups()
        return groups[0]["density_read"] if groups else 0.0

    @property
    def interval(self) -> int:
        """T in force, of the first split group; 0 where there is none."""
        groups = self._split_groups()
        return groups[0]["interval"].at(groups[0]["steps"]) if groups else 0

    def selected_entries(self) -> int:
        """How many entries of split matrices keep state, by the subspaces' own count at the ρ last read.

        Matrices that have had no gradient since the last refresh are counted, though they hold no moments yet.
        """
        return sum(self.state[p].get("entries", 0) for group in self._split_groups() for p in group["params"])

    def state_bytes(self) -> StateBytes:
        """Bytes of state by parameter and role, counted from the tensors."""
        return state_bytes(self)

    def register_refresh_hook(self, hook: Callable[[Refresh], None]) -> RemovableHandle:
        """Call `hook(event)` after each step in which a subspace was chosen anew or shrunk; `.remove()` ends that."""
        handle = RemovableHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_hooks", OrderedDict())  # hooks do not travel with copies

    # -- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with controls and subspaces as plain numbers and strings; `weights_only=True` loads it."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if group["split"]:
                group["density"] = group["density"].state_dict()
                group["interval"] = group["interval"].state_dict()
                group["subspace"] = group["subspace"].settings()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state: groups, controls, clocks, subspace and moments.

        Values and dtypes come back as they were saved. (torch's own loading casts every state tensor to its
        parameter's dtype, which turns indices into floats and float32 moments into bfloat16.)

        Raises:
            ValueError: the state is of another optimizer, or of matrices of other shapes; nothing is changed then.
        """
        _refuse_other(state_dict, self.param_groups)
        before = self._split_groups()
        final: dict[str, Any] = {}  # what is loaded after all hooks have had their say
        handle = self.register_load_state_dict_pre_hook(lambda _, given: final.update(given))
        super().load_state_dict(state_dict)
        handle.remove()
        for group, old in zip(self._split_groups(), before, strict=True):
            group["density"] = controls.restored(group["density"], old["density"])
            group["interval"] = controls.restored(group["interval"], old["interval"])
            if group["subspace"]["kind"] == old["subspace"].kind:  # it may be a class of the user's own
                given = {key: value for key, value in group["subspace"].items() if key != "kind"}
                group["subspace"] = type(old["subspace"])(**given)
            else:
                group["subspace"] = as_subspace(group["subspace"])
        numbers = [n for group in final["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for key, value in final["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else param.device
                    value = torch.empty_like(value, device=device).copy_(value)
                self.state[param][key] = value


def _selection(state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a matrix's state that say where its subspace lies."""
    return {name: state[name] for name in group["subspace"].tensors if name in state}


def _turn(group: Mapping[str, Any]) -> Turn:
    return Turn(seed=group["seed"], number=group["refreshes"], start=group["handed_out"], first=group["first"])


def _refuse_other(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    saved = [(group.get("split"), group.get("shapes")) for group in state_dict["param_groups"]]
    ours = [(group["split"], group.get("shapes")) for group in groups]
    if saved != ours:
        raise ValueError(
            f"the saved state is not this optimizer's: its groups are {_outline(saved)}, ours {_outline(ours)}; "
            "make the optimizer over the same model's groups before loading"
        )


def _outline(groups: list[tuple[bool | None, list[list[int]] | None]]) -> str:
    return "; ".join(f"split matrices {shapes}" if split else "not split" for split, shapes in groups)


def _check_rates(group: Mapping[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, value, allowed, held in (
        ("lr", group["lr"], "0 or more", group["lr"] >= 0),
        ("betas", group["betas"], "two numbers from 0 to below 1", 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps", group["eps"], "0 or more", group["eps"] >= 0),
        ("weight_decay", group["weight_decay"], "0 or more", group["weight_decay"] >= 0),
        ("split_lr_scale", group["split_lr_scale"], "0 or more", group["split_lr_scale"] >= 0),
        ("state_free_lr_scale", group["state_free_lr_scale"], "0 or more", group["state_free_lr_scale"] >= 0),
        ("shrink", group["shrink"], " or ".join(get_args(Shrink)), group["shrink"] in get_args(Shrink)),
    ):
        if not held:
            raise ValueError(f"{name} is {value}; allowed: {allowed}")


def _check_matrices(group: Mapping[str, Any]) -> None:
    names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
    for name, param in zip(names, group["params"], strict=True):
        if param.ndim != 2:
            raise ValueError(
                f"parameter {name} of a split group has shape {tuple(param.shape)}; only matrices can be split: "
                "put it into a group without split=True"
            )
