"""Fira (Chen et al., arXiv 2410.01623)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim.baselines.low_rank import PROJECTION, LowRank, factors, limited, rank_of
from adafrugal.optim.subspaces.base import Period


def residual(grad: Tensor, compact: Tensor, update: Tensor, basis: Tensor, alpha: float, eps: float) -> Tensor:
    """Return the rest of G, scaled as Adam scales R: `S = (G − α·PR)·‖R̃‖/(‖R‖ + ε)`, line by line (§3.2).

    On the right it is `G − α·RPᵀ`. Each line of G along the larger side has the factor of the same line of R.
    """
    rest = PROJECTION.rest(grad, alpha * compact, {"basis": basis})
    return rest * factors(update, compact, PROJECTION.axis(grad.shape), eps)


class Fira(LowRank):
    """Fira: GaLore, and beside it the rest of the gradient, scaled as Adam scales the projection.

    `D = α·PR̃ + S`, where the growth of ‖S‖ is limited. P holds the leading singular vectors of the gradient at the
    refresh. If that gradient is not finite, P stays; without a P yet, D is G, and the state begins at a later step. P
    is state, beside two moments of R's size, a norm and a count. In the paper's formula α is 1; its runs have 0.25,
    where the authors' code leaves 1 − α of the projection in S.

    Args:
        params: matrices, or groups of them. Other arguments: see `LowRank`.
        alpha: α.
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(params, lr, **options, own={"alpha": alpha})

    def _kept(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        size = shape[PROJECTION.axis(shape)], rank_of(shape, group["rank"])
        return super()._kept(shape, group) | {"basis": size}

    def _basis(
        self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], done: int, period: Period
    ) -> Tensor | None:
        if done % group["interval"] == 0 and bool(grad.float().isfinite().all()):
            share = rank_of(grad.shape, group["rank"]) / min(grad.shape)
            chosen = PROJECTION.select(grad, grad, share, period.generator(0), {}, 0)
            state["basis"] = chosen["basis"].to(grad.dtype)
        return state.get("basis")

    def _limited(
        self, grad: Tensor, compact: Tensor, update: Tensor, basis: Tensor, last: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        alpha, eps = group["alpha"], group["eps"]
        rest, norm = limited(residual(grad, compact, update, basis, alpha, eps), last, group["growth"])
        return PROJECTION.back(alpha * update, {"basis": basis}, grad.shape) + rest, norm
