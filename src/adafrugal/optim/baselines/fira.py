"""Fira (Chen et al., arXiv 2410.01623)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adafrugal.optim.baselines.low_rank import PROJECTION, LowRank, factors, limited, rank_of
from adafrugal.optim.subspaces.base import Period


def residual(grad: Tensor, compact: Tensor, update: Tensor, basis: Tensor, eps: float) -> Tensor:
    """Return what P leaves of G, scaled as Adam scales R: `S = (G − PR)·‖R̃‖/(‖R‖ + ε)`, line by line (§3.2).

    On the right it is `G − RPᵀ`. Each line of G along the larger side has the factor of the same line of R.
    """
    rest = PROJECTION.rest(grad, compact, {"basis": basis})
    return rest * factors(update, compact, PROJECTION.axis(grad.shape), eps)


class Fira(LowRank):
    """Fira: GaLore, and beside it the residual of the gradient, scaled as Adam scales the projection.

    `D = PR̃ + S`, where the growth of ‖S‖ is limited. P holds the leading singular vectors of the gradient at the
    refresh. It is state, beside two moments of R's size, a norm and a count.

    Args:
        params: matrices, or groups of them. Other arguments: see `LowRank`.
    """

    def _basis(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], done: int, period: Period) -> Tensor:
        if done % group["interval"] == 0:
            share = rank_of(grad.shape, group["rank"]) / min(grad.shape)
            chosen = PROJECTION.select(grad, grad, share, period.generator(0), {}, 0)
            state["basis"] = chosen["basis"].to(grad.dtype)
        basis: Tensor = state["basis"]
        return basis

    def _limited(
        self, grad: Tensor, compact: Tensor, update: Tensor, basis: Tensor, last: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        rest, norm = limited(residual(grad, compact, update, basis, group["eps"]), last, group["growth"])
        return PROJECTION.back(update, {"basis": basis}, grad.shape) + rest, norm
