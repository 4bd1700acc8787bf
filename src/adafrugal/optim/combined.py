"""Several optimizers that step as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Several(torch.optim.Optimizer):
    """Optimizers over different parameters as one: one step, one state_dict, groups for every scheduler.

    Example: `Several(torch.optim.Muon(matrices), torch.optim.AdamW(others))`. Its groups are the same objects as its
    parts': a rate set here holds there. Schedulers that also change momentum (OneCycleLR, CyclicLR with cycle_momentum)
    are refused, since the parts name it differently. Parts step in the given order.

    Raises:
        ValueError: a parameter is in more than one of them.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        params = [param for part in parts for group in part.param_groups for param in group["params"]]
        if len(set(params)) < len(params):
            raise ValueError("a parameter is in more than one of the optimizers; each may have it alone")
        super().__init__(params, {})
        self._join()

    def _join(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property  # type: ignore[override]
    def state(self) -> dict[torch.Tensor, Any]:
        """The states of all parts, read-only."""
        return {param: state for part in self.parts for param, state in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Ignore the empty state that torch's constructor sets."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step each part; return the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return each part's state_dict, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; if a part refuses its own, raise that error and change nothing."""
        given = state_dict.get("parts", [])
        if len(given) != len(self.parts):
            raise ValueError(f"the saved state is of {len(given)} optimizers, not of {len(self.parts)}")
        for part, state in zip(self.parts, given, strict=True):  # check all before changing any
            ours, theirs = ([len(g["params"]) for g in groups] for groups in (part.param_groups, state["param_groups"]))
            if ours != theirs:
                raise ValueError(f"the saved state has groups of {theirs} tensors, ours have {ours}")
        before = [{"state": part.state, "param_groups": part.param_groups} for part in self.parts]
        try:
            for part, state in zip(self.parts, given, strict=True):
                part.load_state_dict(state)  # makes new dicts and lists, and leaves the old ones as they are
        except BaseException:
            for part, old in zip(self.parts, before, strict=True):
                part.__setstate__(old)
            raise
        self._join()

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = [group for part in state["parts"] for group in part.param_groups]
        super().__setstate__({**state, "param_groups": groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise a ValueError once the parts are joined, because a group takes its defaults from a part."""
        if self.param_groups:
            raise ValueError("add the group to one of the parts, before they are joined")
        super().add_param_group(param_group)
