"""Selections that one process computes for all that have parts of a matrix: bases of its whole gradient.

Matrices are taken in rounds, one for each process: their gradients are gathered, each to its owner, the owners work at
the same time, and what they have found is sent to all. No process holds more than one whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adafrugal.optim import sharded
from adafrugal.optim.subspaces.projections import Projection


class Asked(NamedTuple):
    """A matrix whose basis is wanted.

    Args:
        param: sharded along its rows.
        share: of it that is selected.
        generator: the only source of chance.
    """

    param: Tensor
    share: float
    generator: torch.Generator


def selections(subspace: Projection, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """What a subspace selects in each of some matrices; every process that has parts of them asks for the same.

    Args:
        subspace: one that projects from the right.
        asked: matrices with a gradient, where the subspace needs one.
    """
    if not asked:
        return []
    among, found = sharded.group(asked[0].param), {}
    # the dear ones together, so that no owner waits for a round's longest
    order = sorted(range(len(asked)), key=lambda i: -_cost(asked[i].param.shape))
    for first in range(0, len(order), among.size()):
        places = order[first : first + among.size()]
        found |= zip(places, _round(subspace, [asked[i] for i in places], among), strict=True)
    return [found[i] for i in range(len(asked))]


def _cost(shape: torch.Size) -> int:
    return shape.numel() * min(shape)


def _round(subspace: Projection, asked: Sequence[Asked], among: dist.ProcessGroup) -> list[dict[str, Any]]:
    """The selections of as many matrices as there are processes, or fewer."""
    own: dict[str, Any] = {}
    grads = [_at_owner(each.param, owner, among) if subspace.needs_gradient else None
             for owner, each in enumerate(asked)]  # fmt: skip
    if among.rank() < len(asked):
        mine = asked[among.rank()]
        own = dict(subspace.select(mine.param, grads[among.rank()], mine.share, mine.generator, {}))
    return [_told(subspace, each, own, owner, among) for owner, each in enumerate(asked)]


def _at_owner(param: Tensor, owner: int, among: dist.ProcessGroup) -> Tensor | None:
    """A matrix's whole gradient, on one of the processes."""
    part = sharded.local(param.grad)
    most = math.ceil(param.shape[0] / among.size())  # as many rows as any process has
    padded = part.new_zeros(most, param.shape[1])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(among.size())] if among.rank() == owner else None
    dist.gather(padded, parts, group=among, group_dst=owner)
    return torch.cat(parts)[: param.shape[0]] if parts else None


def _told(
    subspace: Projection, each: Asked, own: dict[str, Any], owner: int, among: dist.ProcessGroup
) -> dict[str, Any]:
    """One matrix's selection, from its owner."""
    if among.rank() == owner:
        basis = own["basis"]
    else:
        shape = each.param.shape[1], subspace.rank(each.param.shape, each.share)
        basis = torch.empty(shape, dtype=torch.float32, device=sharded.local(each.param).device)
    dist.broadcast(basis, group=among, group_src=owner)
    return {"basis": basis, "side": "right"}
