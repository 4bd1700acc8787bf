"""How far the gradient's direction in a group's subspace has moved since the subspace was selected (`Displacement`).

A matrix keeps `first_grad`, the first gradient of its selection: a compact tensor in bfloat16. Only at steps where the
interval's control is to decide are gradients compared with it, and numbers brought to the host.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adafrugal.optim.kernels import tables
from adafrugal.optim.options import Group
from adafrugal.optim.refresh import States, selection_here
from adafrugal.optim.sharding import shards

_PLAIN = torch.contiguous_format
Products: TypeAlias = MutableMapping[Tensor, Tensor]  # by parameter: ⟨R, R₁⟩, ⟨R, R⟩, ⟨R₁, R₁⟩ of its local part, [3]


def is_due(group: Group) -> bool:
    """Return whether the control decides by the gradients of this step."""
    return group["split"] and group["interval"].decides_at(group["since_refresh"])


def note(group: Group, places: Sequence[int], states: States, products: Products) -> None:
    """Keep the first gradients of new selections; at a step where the control decides, compare gradients with them.

    Args:
        group: of the parameters.
        places: of those to look at, which have gradients.
        states: of the parameters.
        products: takes what `decide` reads.
    """
    if not group["split"] or not group["interval"].keeps_gradients:
        return
    for place in places:
        param = group["params"][place]
        state = states[param]
        if not state.get("entries"):
            continue
        is_measured = is_due(group) and place not in group["waiting"]
        first = state.get("first_grad")
        if first is not None and first.numel() and not is_measured:  # the usual case
            continue
        tables.refuse_to_record("its gradient is kept, or compared; ask can_replay() before")
        now = _compact(param, state, group)
        if first is None or first.shape != now.shape:
            state["first_grad"] = torch.empty_like(now, dtype=torch.bfloat16, memory_format=_PLAIN).copy_(now)
        elif is_measured:
            now, first = now.double(), first.double()  # float32 loses squares of entries below 1e-23
            products[param] = torch.stack([(now * first).sum(), now.square().sum(), first.square().sum()])


def _compact(param: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    """Return the gradient within the subspace, of this process's rows."""
    chosen = selection_here(param, state, group)
    target, grad = shards.local(param), shards.local_grad(param)
    return group["subspace"].regions(target, grad.to(target.dtype), chosen, residual=False).full[1]


def decide(group: Group, products: Products) -> None:
    """Tell the control the mean displacement over a group's matrices, if this is a step where it decides.

    The displacement of a matrix is `‖R/‖R‖ − R₁/‖R₁‖‖`, from 0 to 2. Matrices without a gradient, or with one that is
    zero or not finite, are left out; without any the control is told that it is infinite.
    """
    if not is_due(group):
        return
    params = [param for param in group["params"] if param in products]
    for numbers in shards.sharing(params):
        some = [params[i] for i in numbers]
        products.update(zip(some, shards.summed([products[param] for param in some], some[0]), strict=True))
    found: list[float] = []
    for inner, now, first in _numbers([products[param] for param in params]):
        if (scale := math.sqrt(now) * math.sqrt(first)) > 0 and math.isfinite(inner / scale):
            found.append(math.sqrt(max(0.0, 2 - 2 * inner / scale)))
    group["interval"].decide(sum(found) / len(found) if found else math.inf)


def _numbers(products: Sequence[Tensor]) -> list[list[float]]:
    """Bring tensors of one shape to the host, which waits once for a GPU that has them all."""
    return torch.stack([each.to(products[0].device) for each in products]).tolist() if products else []
