"""Count the bytes of an optimizer's state tensors, for this family and torch's own optimizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

# by name in a state; of what a subspace remembers, others are indices
_ROLES = {"step": "counters", "basis": "basis", "first_grad": "gradients"}


class StateBytes(dict[str, dict[str, int]]):
    """Bytes of optimizer state by parameter and role: `{"layers.0.q_proj.weight": {"moments": 524288, …}, …}`.

    Roles are moments (the state-full rule's values for each entry), indices and basis (the subspace's selection),
    counters, and gradients (the first of a selection, where T depends on their displacement). A parameter without state
    is left out.
    """

    @property
    def total(self) -> int:
        """Bytes of all parameters and roles."""
        return sum(sum(roles.values()) for roles in self.values())

    def by_role(self) -> dict[str, int]:
        """Return bytes by role, summed over parameters."""
        roles: Counter[str] = Counter()
        for counted in self.values():
            roles.update(counted)
        return dict(roles)


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    """Count the bytes of an optimizer's state tensors.

    Parameters are listed by name if the optimizer has names (groups made of `(name, parameter)` pairs), else by their
    number in `state_dict`.
    """
    counted = StateBytes()
    place = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [str(place + i) for i in range(len(group["params"]))]
        place += len(group["params"])
        remembered = getattr(group.get("subspace"), "remembers", ())
        for name, param in zip(names, group["params"], strict=True):
            roles: Counter[str] = Counter()
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and value.numel():
                    roles[_ROLES.get(key, "indices" if key in remembered else "moments")] += _bytes(value)
            if roles:
                counted[name if name not in counted else f"{name} ({len(counted)})"] = dict(roles)
    return counted


def adamw_state_bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Return the bytes AdamW would keep, also for frozen parameters: two moments an entry, a four-byte counter each."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of a subclass's inner tensors (quantized moments, a DTensor's local shard)."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return sum(_bytes(part) for part in parts if isinstance(part, Tensor))
    return tensor.numel() * tensor.element_size()
