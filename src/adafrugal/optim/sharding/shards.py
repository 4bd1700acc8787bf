"""Parameters sharded over processes: torch's DTensors, as `fully_shard` makes them.

Each process updates its own rows. All select the same: by the optimizer's seed and the whole matrix's shape, or one
process selects for all (`owners`). State is kept as plain tensors of the selected local entries, and becomes DTensors
in `state_dict`. With replicas along another dimension of the mesh (HSDP), "all processes" of a parameter are those
that share its rows, within one replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from adafrugal.optim.subspaces.base import RowRange

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of a tensor."""
    return any(not placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def is_split_by_rows(tensor: Tensor) -> bool:
    """Return whether every process has whole rows, as `fully_shard` divides a matrix by default."""
    divided = [placement for placement in getattr(tensor, "placements", ()) if not placement.is_replicate()]
    return not divided or (len(divided) == 1 and divided[0].is_shard(0))


def local(tensor: Tensor) -> Tensor:
    """Return this process's part; a plain tensor is whole."""
    if type(tensor) is Tensor or type(tensor) is Parameter:  # the usual case; `hasattr` is slow
        return tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, on every process; a plain tensor is whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_grad(param: Tensor) -> Tensor:
    """Return this process's part of the gradient of a parameter that has one."""
    assert param.grad is not None
    return local(param.grad)


def layout(tensor: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """Return the processes of a DTensor, as a mesh, and how it lies along each dimension of the mesh."""
    return tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]


# -- the processes that share a tensor --------------------------------------------------------------------------------


class Processes(NamedTuple):
    """The processes that share a sharded tensor, with this one's rank among them."""

    group: torch.distributed.ProcessGroup
    rank: int
    size: int


def processes(tensor: Tensor) -> Processes:
    """Return the processes that share a sharded tensor."""
    mesh, placements = layout(tensor)
    dimension = next(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return Processes(mesh.get_group(dimension), mesh.get_local_rank(dimension), mesh.size(dimension))


def sharing(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of sharded tensors, grouped by the processes that share them."""
    found: dict[torch.distributed.ProcessGroup, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            found.setdefault(processes(tensor).group, []).append(i)
    return list(found.values())


def agreed(flags: Sequence[bool], params: Sequence[Tensor]) -> list[bool]:
    """Return, for each parameter, whether all processes that share it pass True; all must call this."""
    result = list(flags)
    for numbers in sharing(params):
        like = params[numbers[0]]
        said = torch.tensor([flags[i] for i in numbers], dtype=torch.int32, device=like.device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=processes(like).group)
        for i, all_do in zip(numbers, said.tolist(), strict=True):
            result[i] = bool(all_do)
    return result


def summed(values: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Return sums over the processes that share `like`, in one collective; all must call this."""
    flat = torch.cat([value.flatten() for value in values])
    torch.distributed.all_reduce(flat, group=processes(like).group)
    parts = torch.split(flat, [value.numel() for value in values])
    return [part.view_as(value) for part, value in zip(parts, values, strict=True)]


# -- rows of each process ---------------------------------------------------------------------------------------------


def row_ranges(length: int, size: int) -> list[RowRange]:
    """Divide rows as torch does, by `torch.chunk`: the last processes have fewer, or none."""
    each = -(-length // size)
    edges = [min(i * each, length) for i in range(size + 1)]
    return [RowRange(first, end - first) for first, end in pairwise(edges)]


def here(tensor: Tensor) -> RowRange:
    """Return the rows of a tensor on this process; they count from 0 if it is not divided by rows."""
    if is_sharded(tensor) and is_split_by_rows(tensor):
        sharers = processes(tensor)
        return row_ranges(tensor.shape[0], sharers.size)[sharers.rank]
    return RowRange(0, len(local(tensor)) if tensor.ndim else 1)


def parts(rows: RowRange, like: Tensor) -> list[RowRange]:
    """Return each process's rows of a compact tensor that has a row for each of these rows of a parameter."""
    common = [rows.common(each) for each in row_ranges(like.shape[0], processes(like).size)]
    return [RowRange(each.first - rows.first, each.count) for each in common]


def moved(value: Tensor, like: Tensor, old: Sequence[RowRange], new: Sequence[RowRange]) -> Tensor:
    """Redistribute a tensor over the processes that share `like`; all must call this.

    `value` is [old[rank].count, …]. `old` and `new` are the rows of each process, in order, from 0 on; `new` has as
    many or fewer in all.
    """
    if old == new:
        return value
    rank = processes(like).rank
    gives = [old[rank].common(rows).count for rows in new]
    takes = [new[rank].common(rows).count for rows in old]
    result = value.new_empty(sum(takes), *value.shape[1:])
    given = value[: sum(gives)].contiguous()
    torch.distributed.all_to_all_single(result, given, takes, gives, group=processes(like).group)
    return result


# -- parts and wholes -------------------------------------------------------------------------------------------------


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor, present on every process, like a parameter of its shape; without communication.

    Raises:
        ValueError: the shapes differ.
    """
    from torch.distributed.tensor import distribute_tensor

    if value.shape != like.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} cannot lie as a parameter of {list(like.shape)} does")
    return distribute_tensor(value.to(like.device), *layout(like), src_data_rank=None)


def shared(value: Tensor, like: Tensor, rows: RowRange) -> Tensor:
    """Return an evenly divided DTensor of the processes' parts of a compact tensor of the parameter `like`.

    The whole has a row for each of `rows`. If these are not all rows of the parameter, they move, and every process
    that shares it must call this.
    """
    from torch.distributed.tensor import DTensor

    shape = like.shape
    if is_split_by_rows(like):
        value = moved(value, like, parts(rows, like), row_ranges(rows.count, processes(like).size))
        shape = torch.Size([rows.count, *value.shape[1:]])
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, *layout(like), run_check=False, shape=shape, stride=strides)


def own_part(value: Tensor, like: Tensor, rows: RowRange) -> Tensor:
    """Return this process's part of a whole compact tensor: a plain one, or a DTensor from `shared`.

    The rows of such a DTensor move as in `shared`; a DTensor divided in another way is made whole first.
    """
    lies_alike = is_sharded(value) and layout(value) == layout(like)
    if not is_split_by_rows(like):
        return local(value if lies_alike else as_sharded(whole(value), like))
    mine = parts(rows, like)
    if lies_alike:
        return moved(local(value), like, row_ranges(rows.count, processes(like).size), mine)
    first, count = mine[processes(like).rank]
    return whole(value)[first : first + count]
