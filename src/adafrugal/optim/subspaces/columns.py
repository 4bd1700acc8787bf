"""Whole input columns of every matrix keep state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adafrugal.optim.subspaces.base import Subspace


@dataclass(frozen=True)
class Columns(Subspace):
    """`int(ρ·n_in)` columns of each [n_out, n_in] matrix, drawn anew at each turn (FRUGAL, arXiv 2411.07837).

    The selection is `indices`: int64, sorted, [n]; compact tensors are [n_out, n].
    """

    kind: ClassVar[str] = "columns"

    def entries(self, shape: torch.Size, share: float) -> int:
        """`n_out · int(ρ·n_in)`."""
        return shape[0] * int(share * shape[1])

    def select(self, matrix: Tensor, share: float, generator: torch.Generator) -> dict[str, Tensor]:
        """The first of a random order of the columns, sorted: fewer columns are a subset of more."""
        order = torch.randperm(matrix.shape[1], generator=generator)
        return {"indices": order[: int(share * matrix.shape[1])].sort().values.to(matrix.device)}

    def take(self, tensor: Tensor, selection: Mapping[str, Tensor]) -> Tensor:
        """The selected columns, [n_out, n]."""
        return tensor.index_select(1, selection["indices"])

    def put(self, tensor: Tensor, part: Tensor, selection: Mapping[str, Tensor]) -> None:
        """Overwrite the selected columns with `part`, [n_out, n]."""
        tensor.index_copy_(1, selection["indices"], part)

    def narrow(self, part: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
        """The columns of `part` that are still selected; both index lists are sorted and `new` lies within `old`."""
        return part.index_select(1, torch.searchsorted(old["indices"], new["indices"]))
