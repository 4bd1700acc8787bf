"""The base of the optimizers here: matrices, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Matrices(torch.optim.Optimizer):
    """A base that updates matrices only, each by its own gradient and state.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.ndim != 2:
                shape, name = list(param.shape), type(self).__name__
                raise ValueError(f"{name} is given a tensor of shape {shape}; allowed: matrices [n_out, n_in]")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update each matrix that has a gradient; return the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = enumerate((param, group) for group in self.param_groups for param in group["params"])
        for place, (param, group) in places:
            if param.grad is not None:
                grad = param.grad.to(param.dtype)
                lr, decay = float(group["lr"]), group["weight_decay"]
                direction = self._direction(grad, self.state[param], group, place)
                if decay:
                    param.mul_(1 - lr * decay)
                param.add_(direction, alpha=-lr)
        return loss

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> Tensor:
        """Return D [n_out, n_in], by which `W ← W(1 − η·λ) − η·D`, and change the state.

        Args:
            grad: G [n_out, n_in], in the dtype of W.
            state: of the matrix, empty at first.
            group: its options.
            place: index of the matrix among all.
        """
        raise NotImplementedError
