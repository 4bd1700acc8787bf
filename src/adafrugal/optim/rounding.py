"""Store float32 results in fewer bits without losing small updates.

Rounded to the nearest, a bfloat16 weight does not move if the update is under 2⁻⁹ of it, however often the update is
repeated. Rounded stochastically, it moves to the next value with the probability that makes the mean exact (Zamirai et
al., arXiv 2010.06192). The noise is a hash of seed, step, tensor and entry, so that a resumed run, every replica, every
division over processes and every kernel (`kernels.one_pass`) round alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

_MASK = 2**32 - 1
Role: TypeAlias = int  # 0: weights; 1 and 2: first and second moment


def noise_key(seed: int, step: int) -> int:
    """Return the 31-bit key of the noise of a step."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/rounding/{step}".encode(), digest_size=4).digest(), "big") >> 1


def noise(key: int, number: int, role: Role, first: int, like: Tensor) -> Tensor:
    """Return 16 random bits for each entry of `like`, int32, its shape; the entries count from `first`.

    `number` is the tensor's index among all parameters.
    """
    most = min(2**30, 2**32 - first % 2**32)  # entries with one upper half, and few enough for int32
    if like.numel() > most:
        flat = like.reshape(-1)
        parts = noise(key, number, role, first, flat[:most]), noise(key, number, role, first + most, flat[most:])
        return torch.cat(parts).view(like.shape)
    high = _mixed(_mixed(_mixed(key + number) + role) + (first >> 32))
    x = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    x.add_(_signed(first)).bitwise_xor_(_signed(high))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # `_mixed` of each, in place: int32 overflows likewise
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(_signed(factor))
    x.bitwise_xor_((x >> 16).bitwise_and_(2**16 - 1))
    return x.bitwise_right_shift_(16).bitwise_and_(2**16 - 1)


def _mixed(x: int) -> int:
    """Return a hash of a 32-bit number (lowbias32, by C. Wellons): every bit depends on every bit of x."""
    x &= _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    """Return the int32 of the same 32 bits."""
    x &= _MASK
    return x - 2**32 if x >= 2**31 else x


@dataclass(frozen=True)
class Rounding:
    """Copies results into tensors of fewer bits, rounded to the nearest or stochastically.

    Args:
        stochastic: for bfloat16; other floating dtypes are rounded to the nearest. (8 bits: `storage.store`.)
        key: of the noise at this step.
        number: the tensor's index among all parameters.
        first: index of the first entry here, within the whole weight and within the whole moments.
    """

    stochastic: bool
    key: int
    number: int
    first: tuple[int, int] = (0, 0)

    def after(self, entries: int) -> Rounding:
        """Return the rounding of the part that begins so many entries later."""
        return replace(self, first=(self.first[0] + entries, self.first[1] + entries))

    def noise(self, like: Tensor, role: Role) -> Tensor:
        """Return 16 random bits for each entry of a result."""
        return noise(self.key, self.number, role, self.first[role > 0], like)

    def store(self, target: Tensor, result: Tensor, role: Role) -> None:
        """Write `result` (same shape, any floating dtype) into `target`."""
        if not (self.stochastic and target.dtype == torch.bfloat16):
            target.copy_(result.to(target.dtype), non_blocking=True)
            return
        # add 16 bits of noise to the 16 bits that bfloat16 drops: the probability that the sum carries into the bits
        # that stay is the fraction that the dropped bits are
        bits = result.float().contiguous().view(torch.int32)
        rounded = self.noise(result, role).add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
        target.copy_(torch.where(result.isfinite(), rounded, result).to(target.dtype), non_blocking=True)
