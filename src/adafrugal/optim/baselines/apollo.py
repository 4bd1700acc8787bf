"""APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adafrugal.optim.baselines.low_rank import PROJECTION, LowRank, factors, limited, rank_of
from adafrugal.optim.subspaces.base import Period


def direction(grad: Tensor, compact: Tensor, update: Tensor, scaling: str, eps: float) -> Tensor:
    """Return G scaled as Adam scales its projection R: `D = G·‖R̃‖/(‖R‖ + ε)` (Algorithm 1).

    With `scaling` "channel" each line of G along the larger side has a factor of its own, from the same line of R; with
    "tensor" G has one.
    """
    dim = PROJECTION.axis(grad.shape) if scaling == "channel" else (0, 1)
    return grad * factors(update, compact, dim, eps)


class Apollo(LowRank):
    """APOLLO: the whole gradient, each channel scaled as Adam scales a random projection of it, with limited growth.

    APOLLO-Mini is `rank=1, scaling="tensor"`. P is Gaussian with variance 1/d, drawn anew at every step from the seed
    on the matrix's device, so that it is no state: of a matrix these are two moments of the larger side times r, a norm
    and a count. The paper's variance is 1/r, so its D is √(r/d) times ours, which is about as large as Adam's update
    for any r; with the paper's α the rate is `lr·α·√(r/d)`.

    Args:
        params: matrices, or groups of them. Other arguments: see `LowRank`.
        scaling: "channel" or "tensor".
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, scaling: str = "channel", **options: Any) -> None:
        super().__init__(params, lr, **options, own={"scaling": scaling})

    def _basis(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], done: int, period: Period) -> Tensor:
        seed = period.generator(0).initial_seed()
        size = grad.shape[PROJECTION.axis(grad.shape)], rank_of(grad.shape, group["rank"])
        generator = torch.Generator(grad.device).manual_seed(seed)
        drawn = torch.randn(size, generator=generator, dtype=torch.float32, device=grad.device)
        return drawn / math.sqrt(size[0])

    def _limited(
        self, grad: Tensor, compact: Tensor, update: Tensor, basis: Tensor, last: Tensor | None, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return limited(direction(grad, compact, update, group["scaling"], group["eps"]), last, group["growth"])
