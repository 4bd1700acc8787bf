"""Moments in 8 bits: a code for each entry, and a scale for each block of a row.

    x = s·(c/C)⁴,  s = max |x| of the block,  C = 127 for codes with a sign, 255 for those without

The fourth root spaces values about evenly on a logarithmic scale: neighbours differ by 4/c of their size, 1.6% at the
largest and 10% at 6·10⁻⁴ of it (without a sign). Blocks lie within rows, so that any division of a matrix by rows
divides codes and scales alike. Block-wise scales and a non-linear code are the idea of 8-bit optimizers (Dettmers et
al., arXiv 2110.02861), whose code is another.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # entries of a row that share a scale


def zeros(like: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes of the shape of `like`, int8 or uint8, and scales [rows, blocks], float32, all 0."""
    rows = _by_rows(like)
    codes = torch.zeros_like(like, dtype=torch.int8 if is_signed else torch.uint8)
    return codes, like.new_zeros(len(rows), -(-rows.shape[1] // BLOCK), dtype=torch.float32)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values of codes."""
    values = codes.float().div_(torch.iinfo(codes.dtype).max)
    values = values.abs().pow_(4).copysign_(values)
    rows = _by_rows(values)
    return rows.mul_(_spread(scales, rows.shape[1])).view(codes.shape)


def encode(values: Tensor, is_signed: bool, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes and scales of float32 values of any shape.

    A code without a sign is at least 1 for a value above 0, so that AdamW's denominator never vanishes. Values that
    are not finite make their block not finite.

    Args:
        values: to store.
        is_signed: whether some may be negative.
        noise: 16 random bits for each entry (`rounding.noise`), by which a value is rounded up or down with its mean
            kept; None: to the nearest.
    """
    dtype = torch.int8 if is_signed else torch.uint8
    most, rows = torch.iinfo(dtype).max, _by_rows(values)
    scales = _blocks(rows.abs()).amax(2)
    size = (rows.abs() / _spread(scales, rows.shape[1])).view(values.shape)  # NaN in a block of zeros
    below = size.sqrt().sqrt_().mul_(most).floor_().clamp_(max=most - 1)
    low, high = (below / most).pow_(4), ((below + 1) / most).pow_(4)
    above = size.sub_(low).div_(high.sub_(low))  # the share of the way to the next code
    is_up = above >= 0.5 if noise is None else above.mul_(2**16) > noise
    codes = below.add_(is_up).nan_to_num_(0.0)
    if not is_signed:
        codes = torch.maximum(codes, (values > 0).to(codes.dtype))
    return codes.copysign_(values).to(dtype), scales


def _by_rows(values: Tensor) -> Tensor:
    """Return a view [rows, entries of a row]; a vector is one row."""
    return values.view(1, -1) if values.ndim < 2 else values.flatten(1)


def _blocks(rows: Tensor) -> Tensor:
    """Return a copy [rows, blocks, BLOCK], with zeros beyond the end of a row."""
    length = rows.shape[1]
    return torch.nn.functional.pad(rows, (0, -length % BLOCK)).view(len(rows), -(-length // BLOCK), BLOCK)


def _spread(scales: Tensor, length: int) -> Tensor:
    """Return the scale of each entry of rows of this length."""
    return scales.repeat_interleave(BLOCK, 1)[:, :length]
