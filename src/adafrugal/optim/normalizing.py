"""The mathematics of state-free rules that normalize a whole matrix.

Each function takes a gradient G [..., n_out, n_in], one matrix or a stack of some, and returns a new tensor of its
shape and dtype, with a root mean square of about 1, as signs have it. Zeros stay zeros; the scale of G has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Total: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # the sums of tensors over all processes
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # of Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon)


def lines(grad: Tensor, dim: int) -> Tensor:
    """Return G with each line along `dim` at a root mean square of 1: −1 normalizes rows, −2 columns."""
    norms = torch.linalg.vector_norm(grad, dim=dim, keepdim=True)
    return grad / _above_zero(norms / math.sqrt(grad.shape[dim]))


def standardized_rows(grad: Tensor) -> Tensor:
    """Return G with each row at mean 0 and standard deviation 1, SWAN's GradNorm (arXiv 2412.13148, §3)."""
    return lines(grad - grad.mean(-1, keepdim=True), -1)


def sinkhorn(grad: Tensor, rounds: int) -> Tensor:
    """Return G after `rounds` of row and then column normalization, SR-Sinkhorn of SinkGD (arXiv 2502.06742, §4)."""
    for _ in range(rounds):
        grad = lines(lines(grad, -1), -2)
    return grad


def columns_of_rows(grads: Sequence[Tensor], lengths: Sequence[int], total: Total) -> list[Tensor]:
    """Return some rows of matrices that have `lengths` rows in all, with columns as `lines` normalizes them."""
    squares = total([torch.linalg.vector_norm(grad, dim=-2, keepdim=True).square() for grad in grads])
    means = (square / length for square, length in zip(squares, lengths, strict=True))
    return [grad / _above_zero(mean.sqrt()) for grad, mean in zip(grads, means, strict=True)]


def whitened(grad: Tensor, steps: int) -> Tensor:
    """Return about `√max(n_out, n_in)·(GGᵀ)^(−1/2)·G`, by Newton–Schulz iterations.

    With `X = G/‖G‖` they are `X ← aX + (bA + cA²)X`, `A = XXᵀ`, or on the right with `A = XᵀX` if that is smaller. Each
    moves the singular values towards 1, where the quintic of Muon leaves them between about 0.7 and 1.2. On a GPU
    products are in bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = grad.shape[-2] > grad.shape[-1]
    add_product = torch.addmm if grad.ndim == 2 else torch.baddbmm
    x = grad / _above_zero(torch.linalg.matrix_norm(grad, keepdim=True))
    if grad.is_cuda:
        x = x.bfloat16()
    for _ in range(steps):
        gram = x.mT @ x if is_tall else x @ x.mT
        factor = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, *((x, factor) if is_tall else (factor, x)), beta=a)
    return x.to(grad.dtype).mul_(math.sqrt(max(grad.shape[-2:])))


def _above_zero(norms: Tensor) -> Tensor:
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)
