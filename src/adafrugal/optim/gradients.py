"""Checks of gradients before a step; all processes that share a parameter come to the same result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adafrugal.optim.options import Group, parameter_names
from adafrugal.optim.sharding.shards import agreed, local


def refuse_sparse(params: Iterable[Tensor]) -> None:
    """Raise a ValueError where one of these parameters has a sparse gradient."""
    if any(param.grad.layout != torch.strided for param in params):
        raise ValueError("Frugal takes no sparse gradients; make the embedding with sparse=False")


def are_finite(params: Sequence[Tensor]) -> bool:
    """Whether the gradients of all parameters are finite; each parameter has one."""
    grads = [grad for param in params if (grad := local(param.grad)).numel()]
    finite = not grads or bool(torch.nn.utils.get_total_norm(grads, float("inf")).isfinite())
    return all(agreed([finite] * len(params), params))


def first_nonfinite(groups: Iterable[Group]) -> str:
    """The name of the first parameter whose gradient is not finite on some process."""
    named = [pair for group in groups for pair in zip(parameter_names(group), group["params"], strict=True)]
    named = [(name, param) for name, param in named if param.grad is not None]
    finite = [bool(local(param.grad).isfinite().all()) for _, param in named]
    finite = agreed(finite, [param for _, param in named])
    return next((name for (name, _), is_so in zip(named, finite, strict=True) if not is_so), "on another process")
