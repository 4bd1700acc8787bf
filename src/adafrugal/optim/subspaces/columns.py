"""Whole input columns of every matrix keep state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adafrugal.optim.subspaces.base import Regions, Selection, Subspace


@dataclass(frozen=True)
class Columns(Subspace):
    """`int(ρ·n_in)` columns of each [n_out, n_in] matrix, drawn anew at each turn (FRUGAL, arXiv 2411.07837).

    The selection is `indices`: int64, sorted, [n]; compact tensors are [n_out, n].
    """

    kind: ClassVar[str] = "columns"
    tensors: ClassVar[tuple[str, ...]] = ("indices",)

    def entries(self, shape: torch.Size, share: float) -> int:
        """`n_out · int(ρ·n_in)`."""
        return shape[0] * int(share * shape[1])

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection
    ) -> Selection:
        """The first of a random order of the columns, sorted."""
        return {"indices": self._first(param.shape, share, generator).to(param.device)}

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """Fewer of the first of the same random order."""
        return {"indices": self._first(shape, share, generator).to(old["indices"].device)}

    def narrow(self, moment: Tensor, old: Selection, new: Selection) -> Tensor:
        """The columns that are still selected; both index lists are sorted and `new` lies within `old`."""
        return moment.index_select(1, torch.searchsorted(old["indices"], new["indices"]))

    def regions(self, param: Tensor, grad: Tensor, selection: Selection) -> Regions:
        """Copies of the selected columns; the state-free rule takes the whole matrix, since `close` overwrites."""
        columns = selection["indices"]
        return Regions(full=(param.index_select(1, columns), grad.index_select(1, columns)), free=((param, grad),))

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Overwrite the selected columns with `target`, [n_out, n]."""
        param.index_copy_(1, selection["indices"], target)

    def _first(self, shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
        return torch.randperm(shape[1], generator=generator)[: int(share * shape[1])].sort().values
