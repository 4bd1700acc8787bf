"""Directions of sharded matrices, by rules that see more than rows.

By sums over all rows, if the rule `sums_rows`: many matrices share each sum. Else by owners: matrices are processed in
rounds of as many as there are processes, the costliest first. In a round each process gathers at most one whole
gradient, makes its direction in parallel with the others, and scatters the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adafrugal.optim import choices
from adafrugal.optim.sharding import shards
from adafrugal.optim.sharding.owners import gathered
from adafrugal.optim.state_free import StateFree

_AT_ONCE = 2**23  # entries on a process of matrices that share sums


def are_shared(param: Tensor, rule: StateFree) -> bool:
    """Return whether processes must make the direction of a parameter together."""
    return shards.is_sharded(param) and not choices.goes_by_rows(rule.sees)


def rounds(params: Sequence[Tensor], rule: StateFree) -> list[list[int]]:
    """Return the indices of matrices in each round; `params` are sharded over the same processes."""
    size = shards.processes(params[0]).size
    if not rule.sums_rows:
        order = sorted(range(len(params)), key=lambda i: -params[i].numel() * min(params[i].shape))
        return [order[start : start + size] for start in range(0, len(order), size)]
    found: list[list[int]] = []
    entries = 0
    for i, param in enumerate(params):
        entries += param.numel()
        if not found or entries > _AT_ONCE * size:
            found.append([])
            entries = param.numel()
        found[-1].append(i)
    return found


def made(rule: StateFree, params: Sequence[Tensor], grads: Sequence[Tensor], first: int) -> list[Tensor]:
    """Return this process's rows of the directions of one round; all that share the matrices must call this.

    Args:
        rule: it sees columns or whole matrices.
        params: the matrices of a round.
        grads: this process's rows of their gradients.
        first: any number, equal on all processes; it rotates the owners of short rounds.
    """
    if rule.sums_rows:
        return rule.of_rows(grads, [param.shape[0] for param in params], partial(shards.summed, like=params[0]))
    size = shards.processes(params[0]).size
    owners = [(first + i) % size for i in range(len(params))]
    wholes = [gathered(*each) for each in zip(params, grads, owners, strict=True)]
    found = [None if whole is None else rule(whole) for whole in wholes]
    del wholes
    return [_scattered(*each) for each in zip(found, params, grads, owners, strict=True)]


def _scattered(whole: Tensor | None, param: Tensor, like: Tensor, owner: int) -> Tensor:
    """Return this process's rows of a matrix that its owner has; `like` has their shape."""
    group, _, size = shards.processes(param)
    most = shards.row_ranges(param.shape[0], size)[0].count
    parts = None
    if whole is not None:  # scatter needs equal shapes
        missing = size * most - len(whole)
        parts = list(torch.nn.functional.pad(whole, (0, 0, 0, missing)).contiguous().chunk(size))
    mine = like.new_empty(most, param.shape[1])
    torch.distributed.scatter(mine, parts, group=group, group_src=owner)
    return mine[: len(like)]
