"""The norm of a step's gradients, for its line of metrics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adafrugal.optim.sharding.shards import local_grad
from adafrugal.training.distributed.ranks import Ranks


class GradientNorm:
    """The 2-norm of all gradients before clipping, kept on the device until its line is written.

    Args:
        module: whose gradients are measured.
        ranks: the processes of the run.
        copies: the number of processes, or of groups of them, that have the whole gradient.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, copies: int) -> None:
        self._module, self._ranks, self._copies = module, ranks, copies
        self._local: Tensor | None = None  # of this process's gradients

    def measure(self, scale: float) -> None:
        """Measure the gradients, which are `scale` times too large; with `update_in_backward` there are none."""
        grads = [local_grad(param) for param in self._module.parameters() if param.grad is not None]
        self._local = torch.nn.utils.get_total_norm(grads) / scale if grads else None

    def take(self) -> dict[str, float]:
        """Return `gradient_norm`; nothing if there was none since the last call. All processes call it."""
        norm, self._local = self._local, None
        if norm is None:
            return {}
        (squares,) = self._ranks.sum([norm.item() ** 2])
        return {"gradient_norm": math.sqrt(squares / self._copies)}
