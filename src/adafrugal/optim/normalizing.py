"""The mathematics of state-free rules that normalize a whole matrix.

Each function takes a gradient G [..., n_out, n_in], one matrix or a stack of some, and returns a new tensor of its
shape and dtype. Its root mean square is about 1, as signs have it; whitened, it is about √(rank/d), d the smaller side.
Zeros stay zeros. The scale of G has no effect: before squares are summed, a line or matrix is brought near 1 by a power
of two, which rounds nothing.
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
    scaled, _ = _near_1(grad, dim)
    return _normalized_(scaled, dim)


def standardized_rows(grad: Tensor) -> Tensor:
    """Return G with each row at mean 0 and standard deviation 1, SWAN's GradNorm (arXiv 2412.13148, §3).

    A row that is constant but for rounding becomes zeros.
    """
    scaled, _ = _near_1(grad, -1)
    mean = scaled.mean(-1, keepdim=True)
    deviations = scaled.sub_(mean)
    size = torch.linalg.vector_norm(deviations, dim=-1, keepdim=True) / math.sqrt(grad.shape[-1])
    roundings = 1 if grad.dtype.itemsize == 2 else 8  # in a mean; 16 bits are summed in float32, and rounded once
    is_constant = size <= roundings * torch.finfo(grad.dtype).eps * mean.abs()
    return deviations.div_(_above_zero(size)).masked_fill_(is_constant, 0)


def sinkhorn(grad: Tensor, rounds: int) -> Tensor:
    """Return G after `rounds` of row and then column normalization, SR-Sinkhorn of SinkGD (arXiv 2502.06742, §4)."""
    grad = lines(lines(grad, -1), -2)
    for _ in range(rounds - 1):  # its lines are near 1 now
        grad = _normalized_(_normalized_(grad, -1), -2)
    return grad


def columns_of_rows(grads: Sequence[Tensor], lengths: Sequence[int], total: Total) -> list[Tensor]:
    """Return some rows of matrices that have `lengths` rows in all, with columns as `lines` normalizes them."""
    return _columns_of_rows_([_near_1(grad, -2) for grad in grads], lengths, total)


def sinkhorn_of_rows(grads: Sequence[Tensor], rounds: int, lengths: Sequence[int], total: Total) -> list[Tensor]:
    """Return some rows of matrices that have `lengths` rows in all, as `sinkhorn` normalizes them."""
    found = columns_of_rows([lines(grad, -1) for grad in grads], lengths, total)
    for _ in range(rounds - 1):
        found = _columns_of_rows_([(_normalized_(grad, -1), 1.0) for grad in found], lengths, total)
    return found


def whitened(grad: Tensor, steps: int) -> Tensor:
    """Return about `√max(n_out, n_in)·(GGᵀ)^(−1/2)·G`, by Newton–Schulz iterations.

    With `X = G/‖G‖` they are `X ← aX + (bA + cA²)X`, `A = XXᵀ`, or on the right with `A = XᵀX` if that is smaller. Each
    moves the singular values towards 1, where the quintic of Muon leaves them between about 0.7 and 1.2. Small ones
    grow by 3.4445 a step: in 5 steps to 485 times σ/‖G‖. On a GPU products are in bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = grad.shape[-2] > grad.shape[-1]
    add_product = torch.addmm if grad.ndim == 2 else torch.baddbmm
    x, _ = _near_1(grad, (-2, -1))
    x.div_(_above_zero(torch.linalg.matrix_norm(x, keepdim=True)))
    if grad.is_cuda:
        x = x.bfloat16()
    for _ in range(steps):
        gram = x.mT @ x if is_tall else x @ x.mT
        factor = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, *((x, factor) if is_tall else (factor, x)), beta=a)
    return x.to(grad.dtype).mul_(math.sqrt(max(grad.shape[-2:])))


def _normalized_(grad: Tensor, dim: int) -> Tensor:
    norms = torch.linalg.vector_norm(grad, dim=dim, keepdim=True)
    return grad.div_(_above_zero(norms / math.sqrt(grad.shape[dim])))


def _columns_of_rows_(
    scaled: Sequence[tuple[Tensor, Tensor | float]], lengths: Sequence[int], total: Total
) -> list[Tensor]:
    """Normalize columns, given rows near 1 and their scales; float64 holds the sums of squares of all processes."""
    own = [torch.linalg.vector_norm(grad, dim=-2, keepdim=True).double() / scale for grad, scale in scaled]
    sizes = [(square / n).sqrt() for square, n in zip(total([x.square() for x in own]), lengths, strict=True)]
    pairs = zip(scaled, sizes, strict=True)
    return [grad.div_(_above_zero((size * scale).to(grad.dtype))) for (grad, scale), size in pairs]


def _near_1(grad: Tensor, dim: int | tuple[int, int]) -> tuple[Tensor, Tensor | float]:
    """Return G times powers of two, and these: they take the largest magnitude along `dim` into [1/2, 1).

    They stay normal numbers, so subnormal magnitudes stay below that, and the very largest above.
    """
    if not grad.numel():
        return grad.clone(), 1.0
    tiny = torch.finfo(grad.dtype).tiny
    largest = torch.maximum(grad.amax(dim, keepdim=True), -grad.amin(dim, keepdim=True)).clamp(tiny, 0.25 / tiny)
    mantissa, _ = torch.frexp(largest.to(torch.promote_types(grad.dtype, torch.float32)))  # CUDA has none in bfloat16
    scale = (mantissa / largest).to(grad.dtype)
    return grad * scale, scale


def _above_zero(norms: Tensor) -> Tensor:
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)
