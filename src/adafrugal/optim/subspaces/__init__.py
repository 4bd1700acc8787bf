"""Subspaces: the entries of split matrices that keep state; and the table of their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adafrugal.optim import choices
from adafrugal.optim.subspaces.base import Matrix, Period, Regions, RowRange, Selection, Subspace
from adafrugal.optim.subspaces.blocks import Blocks
from adafrugal.optim.subspaces.checking import check_subspace
from adafrugal.optim.subspaces.coordinates import Columns, RandK, RandPerm, Rows, Slab
from adafrugal.optim.subspaces.projections import SVD, Random

__all__ = [
    "SUBSPACES", "SVD", "Blocks", "Columns", "Matrix", "Period", "RandK", "RandPerm", "Random", "Regions", "RowRange",
    "Rows", "Selection", "Slab", "Subspace", "check_subspace", "subspace",
]  # fmt: skip

SUBSPACES: dict[str, type[Subspace]] = {s.kind: s for s in (Blocks, Columns, Rows, Slab, RandK, RandPerm, SVD, Random)}


def subspace(value: str | Mapping[str, Any] | Subspace) -> Subspace:
    """Return the subspace that `value` describes: a name with its defaults, a mapping `{"kind": …, …}`, or an object.

    Raises:
        ValueError: an unknown kind or setting.
    """
    return value if isinstance(value, Subspace) else choices.made("subspace", value, SUBSPACES)
