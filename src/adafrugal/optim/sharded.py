"""Parameters that several processes hold parts of: torch's DTensors, as `fully_shard` makes them.

Each process updates its own rows, without a word to the others; what is chosen is the same everywhere, since it is
drawn from the optimizer's seed and the whole matrix's shape, or computed by one process for all (`owners`). State is
kept as plain tensors of the local rows, and becomes a DTensor of the whole in `state_dict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def is_split_by_rows(tensor: Tensor) -> bool:
    """Whether every process has whole rows, as `fully_shard` divides a matrix by default."""
    return all(not placement.is_shard() or placement.is_shard(0) for placement in getattr(tensor, "placements", ()))


def local(tensor: Tensor) -> Tensor:
    """The part that is here; a plain tensor is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, which every process has then; a plain tensor is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rows(tensor: Tensor) -> range:
    """The numbers of the rows that are here: all those of a plain tensor, perhaps none of a sharded one."""
    if not is_sharded(tensor):
        return range(tensor.shape[0] if tensor.ndim else 1)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return range(offset[0], offset[0] + shape[0])


def group(tensor: Tensor) -> ProcessGroup:
    """The processes that have the parts of a sharded tensor between them."""
    axis = next(i for i, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(axis)


def agreed(flag: bool, like: Tensor) -> bool:
    """Whether a flag is set on all processes that have a part of a tensor; the flag, where the tensor is plain."""
    if not is_sharded(like):
        return flag
    import torch.distributed as dist

    found = torch.tensor(int(flag), device=local(like).device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group(like))
    return bool(found)


def as_sharded(value: Tensor, like: Tensor) -> DTensor:
    """A whole plain tensor, which every process has, divided as `like` is; nothing is sent.

    Args:
        value: with as many axes as `like`.
        like: a tensor that is sharded along its first axis.
    """
    from torch.distributed.tensor import empty

    divided = empty(*value.shape, dtype=value.dtype, device_mesh=like.device_mesh, placements=like.placements)
    here = rows(divided)
    # in storage of its own: torch cannot copy a DTensor of a view
    part = torch.empty_like(value[here.start : here.stop], device=local(like).device)
    return shared(part.copy_(value[here.start : here.stop]), like, value.shape[0])


def shared(part: Tensor, like: Tensor, count: int) -> DTensor:
    """A tensor of which the processes have rows as they have `like`'s, from the rows that are here.

    Args:
        part: the rows here.
        like: a parameter.
        count: of all rows.
    """
    from torch.distributed.tensor import DTensor

    shape = (count, *part.shape[1:])
    strides = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """All rows of a tensor of which each process has some, in order of the processes; every one has them then.

    Args:
        part: the rows here, any number of them.
        like: the parameter that they belong to.
    """
    import torch.distributed as dist

    among = group(like)
    counts = [torch.zeros((), dtype=torch.int64, device=part.device) for _ in range(among.size())]
    dist.all_gather(counts, torch.tensor(len(part), device=part.device), group=among)
    padded = part.new_zeros(int(max(counts)), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=among)
    return torch.cat([each[: int(count)] for each, count in zip(parts, counts, strict=True)])
