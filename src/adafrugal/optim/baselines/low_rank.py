"""What APOLLO and Fira share: Adam on a low-rank projection of a matrix's gradient, and a limit on a norm's growth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim.baselines.matrices import Matrices
from adafrugal.optim.subspaces.base import Period
from adafrugal.optim.subspaces.projections import SVD, Projection

PROJECTION: Projection = SVD()  # its sides and products hold for any basis


def adam_(compact: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float) -> Tensor:
    """Return Adam's update of R without bias correction, `R̃ = m/(√v + ε)`; change its moments in place.

    `m ← β₁m + (1 − β₁)R;  v ← β₂v + (1 − β₂)R²`. All have one shape.
    """
    exp_avg.lerp_(compact, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(compact, compact, value=1 - betas[1])
    update: Tensor = exp_avg / exp_avg_sq.sqrt().add_(eps)
    return update


def factors(update: Tensor, compact: Tensor, dim: int | tuple[int, ...], eps: float) -> Tensor:
    """Return `‖R̃‖/(‖R‖ + ε)` along `dim`, which stays as a dimension of length 1."""
    ours, of_gradient = (torch.linalg.vector_norm(value, dim=dim, keepdim=True) for value in (update, compact))
    found: Tensor = ours / of_gradient.add_(eps)
    return found


def limited(direction: Tensor, last: Tensor | None, growth: float) -> tuple[Tensor, Tensor]:
    """Return D with a norm of at most γ times the last one, and that norm (Fira's limiter, arXiv 2410.01623, §3.3).

    `D ← D / max(1, ‖D‖/(γ·last))`. There is no limit after a norm of 0, or at the first step, when `last` is None.
    """
    norm = torch.linalg.vector_norm(direction)
    if last is None:
        return direction, norm
    excess = torch.where(last > 0, norm / (growth * last), 1).clamp(min=1)  # without waiting for a GPU
    return direction / excess, norm / excess


class LowRank(Matrices):
    """A base: each matrix's G [n_out, n_in] has a projection R, on the smaller side d, for which moments are kept.

    `R = GP` [n_out, r] if n_in ≤ n_out, otherwise `R = PᵀG` [r, n_in], with a basis P [d, r] that a subclass gives.
    Every T steps, beginning with the first, P is a new one; moments stay. Random numbers depend on the seed, the place
    of the matrix among all, and the number of the basis.

    Args:
        params: matrices, or groups of them.
        lr: η.
        betas: of Adam.
        eps: ε of Adam, and of the factors.
        weight_decay: λ, decoupled as in AdamW.
        rank: r, at most d; below 1 it is a share of d, and at least one direction.
        interval: T, in steps.
        growth: γ, the largest growth of a norm from one step to the next.
        seed: of random bases.
        own: a subclass's options beside these.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rank: float = 0.25, interval: int = 200, growth: float = 1.01, seed: int = 0,
        own: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        super().__init__(params, options | {"interval": interval, "growth": growth, "seed": seed} | dict(own or {}))

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> Tensor:
        """Return the subclass's D with Adam's bias correction: `√(1 − β₂ᵗ)/(1 − β₁ᵗ)·D`."""
        done = int(state["step"].item()) if "step" in state else 0
        period = Period(group["seed"], done // group["interval"] + 1, first=place)
        basis = self._basis(grad, state, group, done, period)
        if basis is None:
            return grad
        compact = PROJECTION.project(grad, {"basis": basis})
        if not done:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(compact), torch.zeros_like(compact)
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        update = adam_(compact, *moments, betas=group["betas"], eps=group["eps"])
        direction, state["norm"] = self._limited(grad, compact, update, basis, state.get("norm"), group)
        first, second = (1 - beta ** (done + 1) for beta in group["betas"])
        return direction.mul_(second**0.5 / first)

    def _kept(self, shape: torch.Size, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        axis, rank = PROJECTION.axis(shape), rank_of(shape, group["rank"])
        compact = tuple(rank if i == axis else n for i, n in enumerate(shape))
        return {"step": (), "exp_avg": compact, "exp_avg_sq": compact, "norm": ()}

    def _basis(
        self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], done: int, period: Period
    ) -> Tensor | None:
        """Return P [d, r] for a gradient, after `done` steps; None if no state can begin with it, and D is G."""
        raise NotImplementedError

    def _limited(
        self, grad: Tensor, compact: Tensor, update: Tensor, basis: Tensor, last: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return D, a new tensor, and the norm that limits the next one, given the last of these."""
        raise NotImplementedError


def rank_of(shape: torch.Size, rank: float) -> int:
    """Return r for a matrix: `rank`, or that share of the smaller side."""
    smaller = min(shape)
    return max(1, min(smaller, round(rank * smaller) if rank < 1 else int(rank)))
