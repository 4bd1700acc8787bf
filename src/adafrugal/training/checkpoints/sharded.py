"""Sharded tensors of a checkpoint: each process writes its parts; any number of processes can read them.

torch.distributed.checkpoint writes safetensors, a file a process. (Its own format has an index that is a pickle, which
could run code when it is read.) state.pt has a mark in place of each of these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_with_path

from adafrugal.optim import Frugal
from adafrugal.optim.sharding.shards import as_sharded, is_sharded, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

_MARK = "in the shards"  # the key of a mark; its value is the tensor's name


def taken_apart(state: Mapping[str, Any]) -> tuple[dict[str, DTensor], Any]:
    """The sharded tensors in nested dicts and lists, by name, and the rest with a mark for each."""
    tensors: dict[str, DTensor] = {}

    def marked(path: tuple[Any, ...], value: Any) -> Any:
        if not hasattr(value, "placements"):
            return value
        name = ".".join(["state", *(str(key.key if hasattr(key, "key") else key.idx) for key in path)])
        tensors[name] = value
        return {_MARK: name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    rest = tree_map_with_path(marked, state)
    return tensors, rest


def write(directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup) -> Future[Any]:
    """Copy each process's parts, and begin to write the copies; every process calls this with the same names.

    The group is on the CPU; nothing else may use it until the writing ends.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    return dcp.async_save(_with_rows_here(tensors), storage_writer=writer, process_group=group)


def read(directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Fill tensors, whole ones or parts, from a checkpoint's safetensors; every process of a group calls this."""
    if tensors:
        import torch.distributed.checkpoint as dcp

        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(_with_rows_here(tensors), storage_reader=reader, process_group=group)


def _with_rows_here(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which this process has a part; empty storage cannot be copied."""
    return {name: tensor for name, tensor in tensors.items() if local(tensor).numel()}


def read_model(directory: Path, model: PreTrainedModel, group: ProcessGroup | None = None) -> None:
    """Put a checkpoint's weights, sharded or whole, into a model that is sharded or whole."""
    if (directory / "model.safetensors").exists() and not any(map(is_sharded, model.parameters())):
        safetensors.torch.load_model(model, directory / "model.safetensors", strict=True)
    else:
        read(directory, model.state_dict(), group)


def read_optimizer(
    state: Mapping[str, Any], directory: Path, optimizer: torch.optim.Optimizer, group: ProcessGroup | None = None
) -> dict[str, Any]:
    """An optimizer's saved state for this process: its parts of sharded tensors, and all others whole.

    `state` is as the checkpoint's state.pt has it, with marks or with whole tensors; parameters may be sharded.
    """
    params = [param for each in optimizer.param_groups for param in each["params"]]
    if not any(map(is_sharded, params)):
        return whole(state, directory, group)
    divides = isinstance(optimizer, Frugal)  # in load_state_dict, from whole tensors
    numbers = [number for saved in state["param_groups"] for number in saved["params"]]
    tensors: dict[str, Tensor] = {}

    def placed(value: Any, param: Tensor) -> Any:
        if _is_mark(value):
            return _empty(value, tensors, param)
        is_like_it = isinstance(value, Tensor) and value.shape == param.shape
        return as_sharded(value, param) if is_like_it and is_sharded(param) and not divides else value

    found = {
        number: {key: placed(value, param) for key, value in state["state"][number].items()}
        for number, param in zip(numbers, params, strict=True)
        if number in state["state"]
    }
    read(directory, tensors, group)
    return {**state, "state": found}


def whole(state: Any, directory: Path, group: ProcessGroup | None = None) -> Any:
    """A checkpoint's state, or a part of it, with whole tensors in place of the marks, as one process saves it."""
    tensors: dict[str, Tensor] = {}
    found = tree_map(lambda part: _empty(part, tensors) if _is_mark(part) else part, state, is_leaf=_is_mark)
    read(directory, tensors, group)
    return found


def _is_mark(value: Any) -> bool:
    return isinstance(value, Mapping) and _MARK in value


def _empty(mark: Mapping[str, Any], tensors: dict[str, Tensor], like: Tensor | None = None) -> Tensor:
    """An empty tensor for a mark, sharded as `like` is, and noted in `tensors` to be filled."""
    shape, dtype = mark["shape"], getattr(torch, mark["dtype"])
    if like is not None and is_sharded(like):
        from torch.distributed.tensor import empty

        made: Tensor = empty(*shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
    else:
        made = torch.empty(shape, dtype=dtype)
    tensors[mark[_MARK]] = made
    return made
