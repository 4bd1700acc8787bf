"""Parameters that several processes hold parts of: torch's DTensors, as `fully_shard` makes them.

Each process updates its own rows. What is chosen is the same everywhere: it is drawn from the optimizer's seed and the
whole matrix's shape, or one process chooses it for all (`owners`). State is kept as plain tensors of what is selected
in the local rows, and becomes a DTensor in `state_dict`.

A parameter that is replicated along another dimension of the mesh (HSDP) concerns the processes that share its rows,
and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from adafrugal.optim.subspaces import Run


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return any(not placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def is_split_by_rows(tensor: Tensor) -> bool:
    """Whether every process has whole rows, as `fully_shard` divides a matrix by default."""
    divided = [placement for placement in getattr(tensor, "placements", ()) if not placement.is_replicate()]
    return not divided or (len(divided) == 1 and divided[0].is_shard(0))


def local(tensor: Tensor) -> Tensor:
    """The part that is here; a plain tensor is whole."""
    if type(tensor) is Tensor or type(tensor) is Parameter:  # nearly always, and `hasattr` is slow
        return tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, which every process has then; a plain tensor is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# -- who shares a tensor ----------------------------------------------------------------------------------------------


def group_of(tensor: Tensor) -> torch.distributed.ProcessGroup:
    """The processes that a sharded tensor's rows are divided over."""
    return tensor.device_mesh.get_group(_dimension(tensor))


def rank_in(tensor: Tensor) -> int:
    """Which of them this one is."""
    return tensor.device_mesh.get_local_rank(_dimension(tensor))


def size_of(tensor: Tensor) -> int:
    """How many they are."""
    return tensor.device_mesh.size(_dimension(tensor))


def _dimension(tensor: Tensor) -> int:
    return next(i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())


def sharing(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the tensors that are sharded, those that the same processes share together."""
    found: dict[torch.distributed.ProcessGroup, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            found.setdefault(group_of(tensor), []).append(i)
    return list(found.values())


def agreed(flags: Sequence[bool], params: Sequence[Tensor]) -> list[bool]:
    """Of each parameter, whether all processes that share it say so. They all call this.

    Args:
        flags: what this process says of its part.
        params: as many; those that are not divided are each process's own matter.
    """
    result = list(flags)
    for numbers in sharing(params):
        like = params[numbers[0]]
        said = torch.tensor([flags[i] for i in numbers], dtype=torch.int32, device=like.device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=group_of(like))
        for i, all_do in zip(numbers, said.tolist(), strict=True):
            result[i] = bool(all_do)
    return result


# -- where rows lie ---------------------------------------------------------------------------------------------------


def runs(length: int, processes: int) -> list[Run]:
    """How torch divides rows: by `torch.chunk`, the last processes having fewer, or none."""
    each = -(-length // processes)
    edges = [min(i * each, length) for i in range(processes + 1)]
    return [Run(first, end - first) for first, end in pairwise(edges)]


def here(tensor: Tensor) -> Run:
    """The rows of it that this process has; from 0 on where it is not divided by rows."""
    if is_sharded(tensor) and is_split_by_rows(tensor):
        return runs(tensor.shape[0], size_of(tensor))[rank_in(tensor)]
    return Run(0, len(local(tensor)) if tensor.ndim else 1)


def parts(run: Run, like: Tensor) -> list[Run]:
    """How a tensor lies over the processes that has a row for each of a run of a parameter's rows."""
    common = [run.common(rows) for rows in runs(like.shape[0], size_of(like))]
    return [Run(each.first - run.first, each.count) for each in common]


def moved(value: Tensor, like: Tensor, old: Sequence[Run], new: Sequence[Run]) -> Tensor:
    """A tensor divided by rows as `old` says, divided as `new` says. Every process that shares `like` calls this.

    Args:
        value: this process's rows, [old[rank].count, …].
        like: the parameter over whose processes it is divided.
        old: the rows of each process, in order, from 0 on.
        new: likewise; no more rows than in `old`.
    """
    if old == new:
        return value
    rank = rank_in(like)
    gives = [old[rank].common(run).count for run in new]
    takes = [new[rank].common(run).count for run in old]
    result = value.new_empty(sum(takes), *value.shape[1:])
    given = value[: sum(gives)].contiguous()
    torch.distributed.all_to_all_single(result, given, takes, gives, group=group_of(like))
    return result


# -- parts and wholes -------------------------------------------------------------------------------------------------


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, as a DTensor that lies as a parameter does; no word is exchanged.

    Args:
        value: plain, of the parameter's whole shape, of any dtype.
        like: the parameter.

    Raises:
        ValueError: the shapes differ.
    """
    if value.shape != like.shape:
        raise ValueError(f"a tensor of shape {list(value.shape)} cannot lie as a parameter of {list(like.shape)} does")
    return _divided(value, like)


def _divided(value: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shared(value: Tensor, like: Tensor, run: Run) -> Tensor:
    """A compact tensor of a sharded parameter as a DTensor of the whole, evenly divided.

    Where `run` is all of the parameter's rows, it lies as they do. Otherwise its rows move, and every process that
    shares the parameter calls this.

    Args:
        value: this process's part.
        like: the parameter.
        run: the rows of the parameter that the whole compact tensor has a row for.
    """
    from torch.distributed.tensor import DTensor

    shape = like.shape
    if is_split_by_rows(like):
        value = moved(value, like, parts(run, like), runs(run.count, size_of(like)))
        shape = torch.Size([run.count, *value.shape[1:]])
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, like.device_mesh, like.placements, run_check=False, shape=shape, stride=strides)


def own_part(value: Tensor, like: Tensor, run: Run) -> Tensor:
    """What this process keeps of a compact tensor that is whole: a plain one, or a DTensor such as `shared` gives.

    A plain tensor is cut where it is. The rows of a DTensor move as in `shared`; one that is divided in another way is
    made whole first.
    """
    lies_alike = is_sharded(value) and (value.device_mesh, value.placements) == (like.device_mesh, like.placements)
    if lies_alike and is_split_by_rows(like):
        return moved(local(value), like, runs(run.count, size_of(like)), parts(run, like))
    if lies_alike:
        return local(value)
    value = whole(value)
    if not is_split_by_rows(like):
        return local(_divided(value, like))
    mine = parts(run, like)[rank_in(like)]
    return value[mine.first : mine.first + mine.count]
