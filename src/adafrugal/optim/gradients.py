"""Whether gradients are such that a step can be made of them; of parts of them, all processes say the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim import options
from adafrugal.optim.sharding import shards
from adafrugal.optim.sharding.shards import local


def refuse_sparse(params: Iterable[Tensor]) -> None:
    """Raise a ValueError where one of these parameters has a sparse gradient."""
    if any(param.grad.layout != torch.strided for param in params):
        raise ValueError("Frugal takes no sparse gradients; make the embedding with sparse=False")


def are_finite(params: Sequence[Tensor]) -> bool:
    """Whether all gradients are, on every process that has a part of them; each parameter has one."""
    grads = [grad for param in params if (grad := local(param.grad)).numel()]
    finite = not grads or bool(torch.nn.utils.get_total_norm(grads, float("inf")).isfinite())
    return all(shards.agreed([finite] * len(params), params))


def first_nonfinite(groups: Iterable[Mapping[str, Any]]) -> str:
    """The name of the first parameter whose gradient is not finite on some process."""
    named = [pair for group in groups for pair in zip(options.names(group), group["params"], strict=True)]
    named = [(name, param) for name, param in named if param.grad is not None]
    finite = [bool(local(param.grad).isfinite().all()) for _, param in named]
    finite = shards.agreed(finite, [param for _, param in named])
    return next((name for (name, _), is_so in zip(named, finite, strict=True) if not is_so), "on another process")
