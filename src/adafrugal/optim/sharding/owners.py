"""Selections that are costly or need the whole gradient: one process makes each, for all that share the matrix.

Matrices are processed in rounds of as many as there are processes, the costliest first. In a round each process
selects in at most one matrix, in parallel with the others, and holds at most one whole gradient; then all broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adafrugal.optim.sharding import shards
from adafrugal.optim.subspaces.base import Selection, Subspace


class Ask(NamedTuple):
    """The arguments of `Subspace.select` for one matrix."""

    param: Tensor
    share: float
    generator: torch.Generator
    old: Selection
    place: int


def rounds(params: Sequence[Tensor], subspace: Subspace) -> list[list[int]]:
    """Return the indices of matrices in each round; more than one only if one process selects for all."""
    if not subspace.chosen_by_one:
        return [[i] for i in range(len(params))]
    found = [[i] for i, param in enumerate(params) if not shards.is_sharded(param)]
    for numbers in shards.sharing(params):
        numbers.sort(key=lambda i: -params[i].numel() * min(params[i].shape))  # approximate cost of an SVD
        size = shards.processes(params[numbers[0]]).size
        found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return found


def select(asks: Sequence[Ask], subspace: Subspace, first: int) -> list[Selection]:
    """Return the selections of one round, equal on every process that shares its matrices; all must call this.

    `first` is any number, equal on all processes; it rotates the owners of short rounds.
    """
    like = asks[0].param
    if not (subspace.chosen_by_one and shards.is_sharded(like)):
        return [subspace.select(ask.param, ask.param.grad, *ask[1:]) for ask in asks]
    group, rank, size = shards.processes(like)
    owners = [(first + i) % size for i in range(len(asks))]
    grads: list[Tensor | None] = [None] * len(asks)
    if subspace.needs_gradient:  # at most one is whole on this process
        owned = zip(asks, owners, strict=True)
        grads = [gathered(ask.param, shards.local_grad(ask.param), owner) for ask, owner in owned]
    chosen = [subspace.blank(ask.param, ask.share) for ask in asks]
    if rank in owners:
        mine = owners.index(rank)
        chosen[mine] = subspace.select(asks[mine].param, grads[mine], *asks[mine][1:])
    del grads
    for selection, owner in zip(chosen, owners, strict=True):
        for value in selection.values():
            if isinstance(value, Tensor):
                torch.distributed.broadcast(value, group=group, group_src=owner)
    return chosen


def gathered(param: Tensor, own: Tensor, owner: int) -> Tensor | None:
    """Gather a tensor like a sharded matrix, of which `own` is this process's part, on its owner; None on others."""
    group, rank, size = shards.processes(param)
    most = shards.row_ranges(param.shape[0], size)[0].count
    padded = own.new_zeros(most, param.shape[1])  # gather needs equal shapes
    padded[: len(own)] = own
    if rank != owner:
        torch.distributed.gather(padded, group=group, group_dst=owner)
        return None
    result = own.new_empty(size * most, param.shape[1])
    torch.distributed.gather(padded, list(result.chunk(size)), group=group, group_dst=owner)
    return result[: param.shape[0]]
