"""How many bytes an optimizer's state takes, counted from its tensors: this family's and torch's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

_ROLES = {"step": "counters", "indices": "indices", "basis": "basis"}  # by name in a state; all else is moments


class StateBytes(dict[str, dict[str, int]]):
    """Bytes of optimizer state by parameter and role: `{"layers.0.q_proj.weight": {"moments": 524288, …}, …}`.

    Roles are moments (what the rule remembers for each entry), indices and basis (where the subspace lies) and
    counters. A parameter without state is left out.
    """

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(sum(roles.values()) for roles in self.values())

    def by_role(self) -> dict[str, int]:
        """Bytes by role, over all parameters."""
        roles: Counter[str] = Counter()
        for counted in self.values():
            roles.update(counted)
        return dict(roles)


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    """Count the bytes of an optimizer's state tensors.

    Parameters go by their names where the optimizer knows them (groups made of `(name, parameter)` pairs), else by
    their place, as `state_dict` numbers them.
    """
    counted = StateBytes()
    place = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [str(place + i) for i in range(len(group["params"]))]
        place += len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            roles: Counter[str] = Counter()
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    roles[_ROLES.get(key, "moments")] += _bytes(value)
            if roles:
                counted[name if name not in counted else f"{name} ({len(counted)})"] = dict(roles)
    return counted


def adamw_state_bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes that AdamW would keep for all of these, frozen or not: two moments an entry, a four-byte counter each."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, or of those that a tensor subclass is made of (quantized moments, a DTensor's local shard)."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return sum(_bytes(part) for part in parts if isinstance(part, Tensor))
    return tensor.numel() * tensor.element_size()
