"""A run's module over several processes, by torch: copies that sum their gradients (DDP), or shards of one (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from adafrugal.models import fsdp
from adafrugal.settings.schema import TrainerSettings
from adafrugal.training.devices import Place
from adafrugal.training.distributed.ranks import Ranks


def made_on(device: torch.device, settings: TrainerSettings) -> AbstractContextManager[Any]:
    """The context in which to build a model: on its device, whose generator draws the weights.

    A model that will be sharded is built on the CPU, since it may not fit on one GPU; its weights are drawn on the
    device one tensor after the other, and equal those of one process.
    """
    if settings.parallel == "fsdp" and device.type != "cpu":
        return _DrawnOn(device)
    return device


_DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_")  # torch's, on a tensor


class _DrawnOn(TorchFunctionMode):
    """Draw random numbers for tensors on the CPU with a device's generator."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") not in _DRAWS:
            return func(*args, **kwargs)
        target = args[0] if args else kwargs.pop("tensor")  # as torch.nn.init passes it
        with torch.no_grad():
            drawn = func(torch.empty_like(target, device=self._device), *args[1:], **kwargs)
            return target.copy_(drawn)


def spread(module: nn.Module, settings: TrainerSettings, place: Place, ranks: Ranks) -> nn.Module:
    """Wrap or shard a module, whose forward pass gives a loss, for several processes; return the module to call.

    It is the same on all processes, built within `made_on`; a sharded one is moved to the device block by block.
    Gradients are means over the processes: multiply a loss by their number to sum it.
    """
    if ranks.size == 1:
        return module.to(place.device)
    if settings.parallel == "ddp":
        return DistributedDataParallel(
            module.to(place.device),
            device_ids=[place.device] if place.device.type == "cuda" else None,
            forward_sync_buffers=False,  # the rotary frequencies are the same everywhere
            gradient_as_bucket_view=True,  # else gradients are stored twice
        )
    mesh = fsdp.mesh(place.device.type, ranks.size, settings.replicas)
    fsdp.shard(module, settings, mesh, place.precision)
    return module


def accumulating(module: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """The context of a micro-batch's passes: DDP sums gradients once a step, after its last micro-batch.

    FSDP sums after each, since gradients kept for the last would be unsharded on every process.
    """
    if isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()
