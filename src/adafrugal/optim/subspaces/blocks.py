"""Subspaces of blocks: whole matrices, or all matrices of a layer, keep state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import ClassVar

import torch
from torch import Tensor

from adafrugal.optim.subspaces.base import Matrix, Period, Regions, Selection, Subspace


@dataclass(frozen=True)
class Blocks(Subspace):
    """FRUGAL's blocks (arXiv 2411.07837): some matrices are selected whole, others at the next refresh.

    Args:
        order: `descending` starts at the model's last block and wraps, `ascending` at its first, `mirror` alternates
            between both ends and moves inwards; each block is active once in a cycle. `random` is drawn each period.
        unit: a block is a `matrix`, or all split matrices of a transformer `layer` (BAdam, arXiv 2404.02827).
        match: `count`, as in the authors' code, selects `round(ρ·N)` of N matrices, halves to even, or `int(ρ·L)` of L
            layers; if blocks differ in size, their share of the entries differs from ρ. `elements` selects the number
            of blocks, in order, whose entries are nearest to ρ's share.
    """

    kind: ClassVar[str] = "blocks"
    along_axis: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
    any_shape: ClassVar[bool] = True
    order: str = "descending"
    unit: str = "matrix"
    match: str = "count"

    def shares(self, matrices: Sequence[Matrix], density: float, period: Period) -> list[float]:
        """Return 1.0 for active matrices, 0.0 for others."""
        blocks = self._blocks(matrices)
        walk = self._walk(len(blocks), period)
        if self.match == "elements":
            sizes = [sum(matrices[i].shape.numel() for i in blocks[b]) for b in walk]
            reached, target = [0, *accumulate(sizes)], density * sum(sizes)
            count = min(range(len(reached)), key=lambda n: abs(reached[n] - target))
        else:
            count = round(density * len(blocks)) if self.unit == "matrix" else int(density * len(blocks))
        active = set(chain.from_iterable(blocks[b] for b in walk[:count]))
        return [1.0 if i in active else 0.0 for i in range(len(matrices))]

    def handed_out(self, matrices: Sequence[Matrix], active: Sequence[bool]) -> int:
        """Return the number of blocks with an active matrix."""
        return sum(any(active[i] for i in block) for block in self._blocks(matrices))

    def _blocks(self, matrices: Sequence[Matrix]) -> list[list[int]]:
        """Return the indices of each block's matrices, in the model's order."""
        if self.unit == "matrix":
            return [[i] for i in range(len(matrices))]
        members: dict[int, list[int]] = {}
        for i, matrix in enumerate(matrices):
            if matrix.layer is None:
                raise ValueError(
                    f"blocks of unit layer: the layer of {matrix.name} is not known; make the groups with "
                    "split_parameters, or give the group 'layers', a number for each parameter"
                )
            members.setdefault(matrix.layer, []).append(i)
        return [members[layer] for layer in sorted(members)]

    def _walk(self, n: int, period: Period) -> list[int]:
        """Return all blocks in this period's order."""
        if self.order == "random":
            return torch.randperm(n, generator=period.generator(), device="cpu").tolist()
        cycle = {
            "ascending": range(n),
            "descending": range(n - 1, -1, -1),
            "mirror": [n - 1 - i // 2 if i % 2 == 0 else i // 2 for i in range(n)],
        }[self.order]
        return [cycle[(period.start + i) % n] for i in range(n)]

    def entries(self, shape: torch.Size, share: float) -> int:
        """Count all entries of an active matrix, none of another."""
        return shape.numel() if share else 0

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """Return an empty selection: an active matrix is selected whole."""
        return {}

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """Return an update of the whole matrix by the state-full rule."""
        return Regions(full=(param, grad))
