"""Whole matrices keep state, or none of a matrix does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adafrugal.optim.subspaces.base import Regions, Selection, Subspace, Turn

Order = Literal["descending", "ascending", "random"]


@dataclass(frozen=True)
class Blocks(Subspace):
    """FRUGAL's blocks: `round(ρ·N)` of the N matrices, halves to even, taken in turn (arXiv 2411.07837).

    The count is of matrices, as in the authors' code: where they differ in size, the share of entries differs from ρ.

    Args:
        order: `descending` starts at the model's last matrix and wraps, `ascending` at its first; each matrix is
            active once in a cycle. `random` draws anew at each turn.
    """

    kind: ClassVar[str] = "blocks"
    order: Order = "descending"

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order is {self.order!r}; allowed: {', '.join(get_args(Order))}")

    def shares(self, matrices: Sequence[tuple[str, torch.Size]], density: float, turn: Turn) -> list[float]:
        """1.0 for the active matrices, 0.0 for the others."""
        n = len(matrices)
        count = round(density * n)
        if self.order == "random":
            active = set(torch.randperm(n, generator=turn.generator())[:count].tolist())
        else:
            positions = [(turn.start + i) % n for i in range(count)]
            active = {n - 1 - i if self.order == "descending" else i for i in positions}
        return [1.0 if i in active else 0.0 for i in range(n)]

    def entries(self, shape: torch.Size, share: float) -> int:
        """All of an active matrix, none of another."""
        return shape.numel() if share else 0

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection
    ) -> Selection:
        """Nothing to remember: an active matrix is selected whole."""
        return {}

    def regions(self, param: Tensor, grad: Tensor, selection: Selection) -> Regions:
        """The whole matrix keeps state."""
        return Regions(full=(param, grad))
