"""SCALE (Glentis et al., arXiv 2506.16659)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim.baselines.matrices import Matrices
from adafrugal.optim.normalizing import lines


class Scale(Matrices):
    """SCALE: `D = C(m)`, `m ← βm + (1 − β)G`, where C normalizes what feeds each output unit.

    The paper's matrices are [n_in, n_out], and C normalizes their columns. So of an `nn.Linear`'s weight [n_out, n_in]
    it takes rows (`dim=-1`), of an `nn.Embedding`'s [tokens, n_out] columns (`dim=-2`), as the authors' code does. Each
    gets a root mean square of 1. The paper has β = 0.9 in the last layer and 0, which keeps no state, in all others; it
    gives vectors to AdamW.

    Args:
        params: matrices, or groups of them.
        lr: η.
        momentum: β.
        dim: along which lines are normalized: −1 for rows, −2 for columns.
        weight_decay: λ, decoupled as in AdamW.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, dim: int = -1, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "dim": dim, "weight_decay": weight_decay})

    def _kept(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"momentum_buffer": tuple(shape)} if group["momentum"] else {}

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> Tensor:
        if group["momentum"]:
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            grad = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        return lines(grad, group["dim"])
