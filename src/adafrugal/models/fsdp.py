"""Shards of a module, by torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adafrugal.settings.schema import TrainerSettings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def mesh(device: str, processes: int, replicas: int) -> DeviceMesh:
    """Return the processes of a run, which have met, as those that share a model, in `replicas` groups."""
    from torch.distributed.device_mesh import init_device_mesh

    each = processes // replicas
    shape, names = ((processes,), ("shard",)) if replicas == 1 else ((replicas, each), ("copy", "shard"))
    return init_device_mesh(device, shape, mesh_dim_names=names)


def shard(module: nn.Module, settings: TrainerSettings, over: DeviceMesh, precision: str) -> None:
    """Divide each block's weights along their first axis, then those outside the blocks.

    Args:
        module: its forward pass gives a loss.
        settings: whether shards lie in the CPU's memory.
        over: the processes.
        precision: of the matrix products; with bf16 the blocks' weights are gathered in it.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": over}
    if settings.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=over.device_type == "cuda")
    # the blocks' weights are gathered in autocast's type; those outside stay float32, and so do the residual sums that
    # run through the blocks, as on one device
    halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = {"mp_policy": halved} if precision == "bf16" else {}
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for block in (block for blocks in lists for block in blocks):
        fully_shard(block, **options, **policy)
    fully_shard(module, **options)
