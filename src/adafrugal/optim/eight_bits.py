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
    codes = torch.zeros_like(like, dtype=torch.int8 if is_signed else torch.uint8)
    return codes, like.new_zeros(scales_shape(like.shape), dtype=torch.float32)


def scales_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the shape of the scales of codes of this shape: rows and blocks."""
    rows, length = rows_of(shape)
    return rows, -(-length // BLOCK)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values of codes."""
    values = codes.float().div_(torch.iinfo(codes.dtype).max)
    values = values.square().square_().copysign_(values)
    rows, length = rows_of(codes.shape)
    if length % BLOCK:
        values.view(rows, length).mul_(scales.repeat_interleave(BLOCK, 1)[:, :length])
    else:
        values.view(rows, length // BLOCK, BLOCK).mul_(scales.unsqueeze(2))
    return values


def encode(values: Tensor, is_signed: bool, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes and scales of float32 values of any shape.

    A code without a sign is at least 1 for a value above 0, so that m/√v stays bounded. Values that are not finite make
    their block not finite.

    Args:
        values: to store.
        is_signed: whether some may be negative.
        noise: 16 random bits for each entry (`rounding.noise`), by which a value is rounded up or down with its mean
            kept; None: to the nearest.
    """
    dtype = torch.int8 if is_signed else torch.uint8
    most, (rows, length) = torch.iinfo(dtype).max, rows_of(values.shape)
    blocks = -(-length // BLOCK)
    size = torch.nn.functional.pad(values.abs().reshape(rows, length), (0, blocks * BLOCK - length))
    scales = size.view(rows, blocks, BLOCK).amax(2)
    size.view(rows, blocks, BLOCK).div_(scales.unsqueeze(2))  # NaN in a block of zeros
    size = size[:, :length].reshape(values.shape)
    below = size.sqrt().sqrt_().mul_(most).floor_().clamp_(max=most - 1)
    low, high = (below / most).square_().square_(), (below + 1).div_(most).square_().square_()
    above = size.sub_(low).div_(high.sub_(low))  # the share of the way to the next code
    above = above.ge_(0.5) if noise is None else above.mul_(2**16).gt_(noise)
    codes = below.add_(above).nan_to_num_(0.0)
    return (codes.copysign_(values) if is_signed else torch.maximum(codes, values.sign())).to(dtype), scales


def rows_of(shape: torch.Size) -> tuple[int, int]:
    """Return the number of rows, and the entries of one; a vector is one row."""
    return (1, shape.numel()) if len(shape) < 2 else (shape[0], shape[1:].numel())
