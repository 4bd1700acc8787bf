"""Store float32 results in bfloat16 without losing small updates."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Rounding:
    """Copies results into tensors of fewer bits, rounded to the nearest or stochastically.

    Rounded to the nearest, a bfloat16 weight does not move if the update is under 2⁻⁹ of it, however often the update
    is repeated. Rounded stochastically, it moves to the next value with the probability that makes the mean exact
    (Zamirai et al., arXiv 2010.06192).

    Args:
        stochastic: for bfloat16; all other dtypes are rounded to the nearest.
        seed, step, place: the optimizer's seed, the step, and the tensor's index among all parameters.
        first_row: of a sharded tensor on this process. The noise depends only on these four, so that a resumed run and
            every replica round alike, and no two parts of a matrix do.
    """

    def __init__(self, stochastic: bool, seed: int, step: int, place: int, first_row: int = 0) -> None:
        self.stochastic = stochastic
        where = f"{place}/{first_row}" if first_row else f"{place}"
        digest = hashlib.blake2b(f"{seed}/rounding/{step}/{where}".encode(), digest_size=7).digest()
        self._seed = int.from_bytes(digest, "big")
        self._generator: torch.Generator | None = None

    def store(self, target: Tensor, result: Tensor) -> None:
        """Write `result` (same shape, any floating dtype, the same device at every call) into `target`."""
        if not (self.stochastic and target.dtype == torch.bfloat16):
            target.copy_(result)
            return
        if self._generator is None:
            self._generator = torch.Generator(result.device).manual_seed(self._seed)
        # add 16 bits of noise to the 16 bits that bfloat16 drops: the probability that the sum carries into the bits
        # that stay is the fraction that the dropped bits are
        noise = torch.randint(2**16, result.shape, dtype=torch.int32, device=result.device, generator=self._generator)
        bits = result.float().contiguous().view(torch.int32)
        rounded = noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
        target.copy_(torch.where(result.isfinite(), rounded, result))
