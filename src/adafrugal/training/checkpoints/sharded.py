"""The tensors of a checkpoint of which each process has a part: written side by side, read by any number of processes.

torch.distributed.checkpoint writes them as safetensors, a file a process, each part with its place in the whole.
(torch's own form of its index is a pickle, which could run code when it is read.) A checkpoint's other file, state.pt,
says where in the state each belongs.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from adafrugal.optim import Frugal
from adafrugal.optim.sharding.shards import as_sharded, is_sharded, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

_MARK = "in the shards"  # the key of what stands in state.pt for a tensor


def taken_apart(value: Any, name: str = "state") -> tuple[dict[str, DTensor], Any]:
    """What is sharded in nested dicts and lists, by name, and the rest, with a mark where each was."""
    if isinstance(value, Tensor) and hasattr(value, "placements"):
        mark = {_MARK: name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return {name: value}, mark
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {}, value
    tensors: dict[str, DTensor] = {}
    rest = {}
    for key, part in pairs:
        found, rest[key] = taken_apart(part, f"{name}.{key}")
        tensors |= found
    return tensors, rest if isinstance(value, Mapping) else type(value)(rest.values())


def write(directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup) -> Future[Any]:
    """Copy each process's parts, and begin to write the copies; every process calls this.

    Args:
        directory: for the files.
        tensors: by name; each process gives the same names.
        group: on the CPU, which nobody else talks in meanwhile.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    return dcp.async_save(_with_rows_here(tensors), storage_writer=writer, process_group=group)


def read(directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Fill tensors, whole ones or parts, from a checkpoint's safetensors; every process of a group calls this.

    Raises:
        CheckpointException: one of them is not there, or of another shape.
    """
    if tensors:
        import torch.distributed.checkpoint as dcp

        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(_with_rows_here(tensors), storage_reader=reader, process_group=group)


def _with_rows_here(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of which this process has something; storage without a byte cannot be copied."""
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
    """An optimizer's saved state as this process needs it: parts of what it has parts of, all else whole.

    Args:
        state: as a checkpoint's state.pt has it, with marks or with whole tensors.
        directory: of the checkpoint.
        optimizer: whose parameters say what lies where.
        group: of the processes that read; None where one does.
    """
    params = [param for each in optimizer.param_groups for param in each["params"]]
    if not any(map(is_sharded, params)):
        return whole(state, directory, group)
    numbers = [number for saved in state["param_groups"] for number in saved["params"]]
    tensors: dict[str, Tensor] = {}
    found = {}
    for number, param in zip(numbers, params, strict=True):
        kept = state["state"].get(number)
        if kept is not None:
            found[number] = {key: _lying_as(param, value, tensors) for key, value in kept.items()}
    read(directory, tensors, group)
    if not isinstance(optimizer, Frugal):  # which divides whole tensors itself
        for number, param in zip(numbers, params, strict=True):
            for key, value in found.get(number, {}).items():
                if is_sharded(param) and isinstance(value, Tensor) and value.shape == param.shape:
                    found[number][key] = value if is_sharded(value) else as_sharded(value, param)
    return {**state, "state": found}


def _lying_as(param: Tensor, value: Any, tensors: dict[str, Tensor]) -> Any:
    """What a mark stands for, as an empty tensor that is noted to be filled; all other values as they are."""
    if not (isinstance(value, Mapping) and _MARK in value):
        return value
    shape, dtype = value["shape"], getattr(torch, value["dtype"])
    if is_sharded(param):
        from torch.distributed.tensor import empty

        made: Tensor = empty(*shape, dtype=dtype, device_mesh=param.device_mesh, placements=param.placements)
    else:
        made = torch.empty(shape, dtype=dtype)
    tensors[value[_MARK]] = made
    return made


def whole(state: Any, directory: Path, group: ProcessGroup | None = None) -> Any:
    """A checkpoint's state, or a part of it, with whole tensors in place of the marks: as one process saves it."""
    tensors: dict[str, Tensor] = {}
    found = _without_marks(state, tensors)
    read(directory, tensors, group)
    return found


def _without_marks(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if _MARK in value:
            return _lying_as(torch.empty(0), value, tensors)
        return type(value)((key, _without_marks(part, tensors)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_without_marks(part, tensors) for part in value)
    return value
