"""Parameters that several processes hold parts of: torch's DTensors, as `fully_shard` makes them.

Each process updates its own part, without a word to the others; what is chosen is the same everywhere, since it is
drawn from the optimizer's seed and the whole matrix's shape. State is kept as plain tensors of the local part, and
becomes a DTensor, sharded as its parameter is, in `state_dict`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


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


def shared(value: Any, like: Tensor) -> Any:
    """A moment of a parameter's local part as a part of the whole; counters, and what is whole anyway, as they are.

    Args:
        value: what is kept of `like`.
        like: the parameter.
    """
    if not (is_sharded(like) and isinstance(value, Tensor) and value.ndim == like.ndim and value.ndim):
        return value
    from torch.distributed.tensor import DTensor

    shape = (like.shape[0], *value.shape[1:])
    strides = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return DTensor.from_local(
        value, like.device_mesh, like.placements, run_check=False, shape=shape, stride=tuple(strides)
    )
