"""Subspaces: the entries of split matrices that keep state; and the table of their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from adafrugal.optim.subspaces.base import Matrix, Period, Regions, RowRange, Selection, Subspace
from adafrugal.optim.subspaces.blocks import Blocks
from adafrugal.optim.subspaces.coordinates import Columns, RandK, RandPerm, Rows, Slab
from adafrugal.optim.subspaces.projections import SVD, Random

__all__ = [
    "SUBSPACES", "SVD", "Blocks", "Columns", "Matrix", "Period", "RandK", "RandPerm", "Random", "Regions", "RowRange",
    "Rows", "Selection", "Slab", "Subspace", "subspace",
]  # fmt: skip

SUBSPACES: dict[str, type[Subspace]] = {s.kind: s for s in (Blocks, Columns, Rows, Slab, RandK, RandPerm, SVD, Random)}


def subspace(value: str | Mapping[str, Any] | Subspace) -> Subspace:
    """Return the subspace that `value` describes: a name with its defaults, a mapping `{"kind": …, …}`, or an object.

    Raises:
        ValueError: an unknown kind or setting.
    """
    if isinstance(value, Subspace):
        return value
    described = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kind = described.pop("kind", None)
    if not isinstance(kind, str) or kind not in SUBSPACES:
        raise ValueError(f"subspace is {kind!r}; allowed: {', '.join(SUBSPACES)}")
    allowed = [f.name for f in fields(SUBSPACES[kind])]
    for key in described:
        if key not in allowed:
            raise ValueError(f"subspace {kind!r} has no {key!r}; it has {', '.join(allowed) or 'no settings'}")
    return SUBSPACES[kind](**described)
