"""FRUGAL and AdaFRUGAL as one composed optimizer.

Which entries keep state is the subspace's answer, how many the density's (ρ), for how long the interval's (T); what
updates them are the rules. This file is the bookkeeping between the four.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from adafrugal.optim import controls, rules
from adafrugal.optim.accounting import StateBytes, state_bytes
from adafrugal.optim.subspaces import Subspace, Turn
from adafrugal.optim.subspaces import subspace as as_subspace

Shrink = Literal["immediately", "at_refresh"]


@dataclass(frozen=True)
class Refresh:
    """A new choice of the subspace, or its shrinking between two choices.

    Args:
        event: "refresh", or "shrink" where ρ fell between refreshes and part of the subspace was given up.
        step: the optimizer step at which it happened; the first is 1.
        group: the index of the parameter group.
        density, interval: ρ and T as read at this step.
        seconds: host time of the choice itself. Work that a GPU is still doing is not in it.
        bytes_before, bytes_after: the whole optimizer's state before the step and after it, in bytes.
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
        defaults = {
            "split": False, "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "density": density, "interval": interval, "subspace": subspace, "split_lr_scale": split_lr_scale,
            "state_free_lr_scale": state_free_lr_scale, "shrink": shrink, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    # -- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; a split one starts with a refresh at the next step."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_rates(group)
            if group["split"]:
                _check_matrices(group)
                # a group has controls of its own: `density`, `interval` and `subspace` become objects here
                group["density"] = controls.density(group["density"])
                group["interval"] = controls.interval(group["interval"])
                group["subspace"] = as_subspace(group["subspace"])
                group |= {"steps": 0, "refreshes": 0, "since_refresh": 0, "handed_out": 0, "density_read": 0.0}
                group["first"] = sum(len(g["params"]) for g in self.param_groups[:-1])
            else:
                for key in ("density", "interval", "subspace", "shrink", "seed"):
                    group.pop(key)
        except ValueError:
            del self.param_groups[-1]
            raise

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
        changes = []
        for index, group in enumerate(self.param_groups):
            if group["split"]:
                changes += self._advance(index, group)
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
        grad = param.grad
        if grad.is_sparse:
            raise ValueError("Frugal takes no sparse gradients; make the embedding with sparse=False")
        lr, state = float(group["lr"]), self.state[param]
        rules.decay_(param, lr=lr, weight_decay=group["weight_decay"])
        if not group["split"]:
            self._state_full(param, grad, state, group, lr)
            return
        lr *= group["split_lr_scale"]
        free_lr = lr * group["state_free_lr_scale"]
        if not state["entries"]:
            rules.signsgd_(param, grad, lr=free_lr)
        elif not (selection := _selection(state)):
            self._state_full(param, grad, state, group, lr)
        else:
            subspace = group["subspace"]
            part = subspace.take(param, selection)
            self._state_full(part, subspace.take(grad, selection), state, group, lr)
            rules.signsgd_(param, grad, lr=free_lr)
            subspace.put(param, part, selection)

    def _state_full(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: Mapping[str, Any], lr: float
    ) -> None:
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        rules.adamw_(
            param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
            lr=lr, betas=group["betas"], eps=group["eps"],
        )  # fmt: skip

    # -- the subspace ---------------------------------------------------------------------------------------------

    def _advance(self, index: int, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Move a split group's clock by one step, and its subspace where that is due; tell what changed."""
        group["steps"] += 1
        density = group["density"].at(group["steps"])
        interval = group["interval"].at(group["steps"])
        due = group["refreshes"] == 0 or group["since_refresh"] >= interval
        falls = group["shrink"] == "immediately" and density < group["density_read"]
        group["since_refresh"] += 1
        if not due and not falls:
            return []
        started = time.perf_counter()
        before = self.state_bytes().total if self._refresh_hooks else 0
        if due:
            self._refresh(group, density)
        elif not self._shrink(group, density):
            return []
        return [{
            "event": "refresh" if due else "shrink", "step": group["steps"], "group": index, "density": density,
            "interval": interval, "seconds": time.perf_counter() - started, "bytes_before": before,
        }]  # fmt: skip

    def _refresh(self, group: dict[str, Any], density: float) -> None:
        """Choose the subspace anew. All of the old state is let go before any of the new is taken."""
        for param in group["params"]:
            group["handed_out"] += bool(self.state[param].get("entries"))
            self.state[param].clear()
        group["refreshes"] += 1
        group["since_refresh"] = 1
        for place, share in enumerate(self._shares(group, density)):
            param = group["params"][place]
            self.state[param].update(self._select(group, place, share))

    def _shrink(self, group: dict[str, Any], density: float) -> bool:
        """Give up what a lower density no longer covers; what remains keeps its moments. Tells if anything did."""
        changed = False
        for place, share in enumerate(self._shares(group, density)):
            param = group["params"][place]
            state = self.state[param]
            if group["subspace"].entries(param.shape, share) >= state["entries"]:
                continue
            changed = True
            chosen, old = self._select(group, place, share), _selection(state)
            if not chosen["entries"]:
                state.clear()
            for key in state.keys() & {"exp_avg", "exp_avg_sq"}:
                state[key] = group["subspace"].narrow(state[key], old, _selection(chosen))
            state.update(chosen)
        return changed

    def _shares(self, group: dict[str, Any], density: float) -> list[float]:
        group["density_read"] = density
        return group["subspace"].shares([p.numel() for p in group["params"]], density, _turn(group))

    def _select(self, group: Mapping[str, Any], place: int, share: float) -> dict[str, Any]:
        """The state that says what is selected in one matrix: `entries`, their number, and the selection's tensors."""
        param, subspace = group["params"][place], group["subspace"]
        entries = subspace.entries(param.shape, share)
        selection = subspace.select(param, share, _turn(group).generator(str(place))) if entries else {}
        return {"entries": entries, **selection}

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
        """How many entries of split matrices keep state, by the subspaces' own count at the ρ last read."""
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
        """
        super().load_state_dict(state_dict)
        for group in self._split_groups():
            group["density"] = controls.density(group["density"])
            group["interval"] = controls.interval(group["interval"])
            group["subspace"] = as_subspace(group["subspace"])
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else param.device
                    value = torch.empty_like(value, device=device).copy_(value)
                self.state[param][key] = value


def _selection(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state that say where the subspace lies; empty where the whole matrix is selected."""
    return {key: state[key] for key in ("indices",) if key in state}


def _turn(group: Mapping[str, Any]) -> Turn:
    return Turn(seed=group["seed"], number=group["refreshes"], start=group["handed_out"])


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
