"""Subspaces of coordinates: whole columns or rows, or single entries of every matrix keep state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adafrugal.optim.rules import Free
from adafrugal.optim.subspaces.base import Regions, RowRange, Selection, Subspace


@dataclass(frozen=True)
class _Lines(Subspace):
    """Whole lines of a matrix [n_out, n_in], drawn at each refresh.

    The selection is `indices` [n], int64, sorted so that at ρ = 1 kept moments stay with their entries. Compact tensors
    are [n_out, n] for columns and [n, n_in] for rows.
    """

    remembers: ClassVar[tuple[str, ...]] = ("indices",)
    along_axis: ClassVar[bool] = True
    along: ClassVar[int | None] = None  # axis that counts the lines; None: that of the smaller side

    def axis(self, shape: torch.Size) -> int:
        """Return the axis that counts the lines."""
        return self.along if self.along is not None else 1 if shape[1] <= shape[0] else 0

    def lines(self, shape: torch.Size, share: float) -> int:
        """Return the number of lines to select."""
        return int(share * shape[self.axis(shape)])

    def entries(self, shape: torch.Size, share: float) -> int:
        """Return the number of lines times their length."""
        return self.lines(shape, share) * shape[1 - self.axis(shape)]

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """Draw a random order of the lines; return the first of them, sorted."""
        return {"indices": self._drawn(param.shape, share, generator).to(param.device)}

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """Return fewer of the first lines in the same random order."""
        return {"indices": self._drawn(shape, share, generator).to(old["indices"].device)}

    def _drawn(self, shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
        order = torch.randperm(shape[self.axis(shape)], generator=generator, device="cpu")
        return order[: self.lines(shape, share)].sort().values

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """Return zeros to hold the state-full update, and the whole matrix, with selected lines scaled by 0."""
        axis, scale = self.axis(param.shape), None
        taken = grad.gather(axis, self._spread(selection, axis, grad))
        if residual:
            scale = torch.ones(param.shape[axis], dtype=param.dtype, device=param.device)
            scale = scale.index_fill_(0, selection["indices"], 0.0).unsqueeze(1 - axis)
        return Regions(full=(torch.zeros_like(taken), taken), free=(Free(param, grad, scale),))

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Add the update to the selected lines."""
        axis = self.axis(param.shape)
        param.scatter_add_(axis, self._spread(selection, axis, param), target)

    def _spread(self, selection: Selection, axis: int, like: Tensor) -> Tensor:
        """Expand the indices to a compact tensor's shape, as a view; gather is far faster than index_select."""
        indices: Tensor = selection["indices"]
        length = like.shape[1 - axis]
        return indices.expand(length, -1) if axis else indices.unsqueeze(1).expand(-1, length)


@dataclass(frozen=True)
class Columns(_Lines):
    """`int(ρ·n_in)` input columns of each matrix (FRUGAL, arXiv 2411.07837)."""

    kind: ClassVar[str] = "columns"
    along: ClassVar[int | None] = 1


@dataclass(frozen=True)
class Rows(_Lines):
    """`int(ρ·n_out)` output rows of each matrix (FRUGAL, arXiv 2411.07837)."""

    kind: ClassVar[str] = "rows"
    along: ClassVar[int | None] = 0


@dataclass(frozen=True)
class RandPerm(_Lines):
    """`round(ρ·d)` coordinates of each matrix's smaller side d, drawn at each refresh (FRUGAL, arXiv 2411.07837).

    This is a low-rank projection whose basis is part of a permutation matrix: columns if n_in ≤ n_out, else rows.
    """

    kind: ClassVar[str] = "randperm"

    def lines(self, shape: torch.Size, share: float) -> int:
        """Return the rank, rounded, halves to even."""
        return round(share * min(shape))


@dataclass(frozen=True)
class RandK(Subspace):
    """`int(ρ·n_out·n_in)` single entries of each matrix, drawn at each refresh (FRUGAL, arXiv 2411.07837).

    The selection is `indices` [n]: sorted positions in the flattened matrix, int32 if its size allows that, which is as
    large as one float32 moment. Compact tensors are [n].
    """

    kind: ClassVar[str] = "randk"
    remembers: ClassVar[tuple[str, ...]] = ("indices",)
    grain: ClassVar[float] = 1 / 64  # to shrink copies all of the matrix's state

    def entries(self, shape: torch.Size, share: float) -> int:
        """Return `int(ρ·n_out·n_in)`."""
        return int(share * shape.numel())

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """Draw a random order of the entries; return the first of them, sorted."""
        first = torch.randperm(param.numel(), generator=generator, device="cpu")[: self.entries(param.shape, share)]
        narrow = torch.int32 if param.numel() <= torch.iinfo(torch.int32).max else torch.int64
        return {"indices": first.sort().values.to(param.device, narrow)}

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """Return a random part of the old entries."""
        before = old["indices"]
        order = torch.randperm(len(before), generator=generator, device="cpu")
        stays = order[: self.entries(shape, share)].sort().values
        return {"indices": before[stays.to(before.device)]}

    def compact(self, shape: torch.Size, selection: Selection) -> torch.Size:
        """Return [n], the shape of the indices."""
        return torch.Size([len(selection["indices"])])

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """Return copies of the selected entries, and the whole matrix, since `close` overwrites those entries."""
        indices = selection["indices"].long()
        return Regions(full=(param.take(indices), grad.take(indices)), free=(Free(param, grad),))

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Overwrite the selected entries with `target`, [n]."""
        param.put_(selection["indices"].long(), target)


@dataclass(frozen=True)
class Slab(Subspace):
    """`int(ρ·n_out)` contiguous rows of each matrix, which advance at each refresh. Ours, in no paper.

    A slab is a view, so that nothing is gathered or scattered and fused kernels update it in place. The fewest slabs
    that cover the matrix lie at even distances, from its first row to its last. Each refresh takes the next slab: the
    first that ends beyond the end of the previous one. Start slabs are spread evenly over matrices of one shape, so
    that processes that share matrices by rows keep about equal state.

    The selection is `start` and `rows`, two numbers. Compact tensors are [rows, n_in].
    """

    kind: ClassVar[str] = "slab"
    remembers: ClassVar[tuple[str, ...]] = ("start", "rows")
    numbers: ClassVar[tuple[str, ...]] = ("start", "rows")
    along_axis: ClassVar[bool] = True
    in_place: ClassVar[bool] = True

    def entries(self, shape: torch.Size, share: float) -> int:
        """Return `int(ρ·n_out)·n_in`."""
        return int(share * shape[0]) * shape[1]

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """Return the next slab."""
        n, rows = param.shape[0], int(share * param.shape[0])
        count = -(-n // rows)
        starts = [i * (n - rows) // max(1, count - 1) for i in range(count)]
        if not old:
            return {"start": starts[int(_van_der_corput(place) * count)], "rows": rows}
        ended = (old["start"] + old["rows"]) % n
        return {"start": next(start for start in starts if start + rows > ended), "rows": rows}

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """Return the first of the rows; the next refresh takes the released ones."""
        return {"start": old["start"], "rows": int(share * shape[0])}

    def positions(self, shape: torch.Size, selection: Selection) -> Tensor:
        """Return the indices of the rows."""
        return torch.arange(selection["start"], selection["start"] + selection["rows"], device="cpu")

    def narrow(self, moment: Tensor, shape: torch.Size, old: Selection, new: Selection) -> Tensor:
        """Return a copy of the first rows."""
        return moment[: new["rows"]].clone()

    def row_range(self, shape: torch.Size, selection: Selection) -> RowRange:
        """Return the slab's rows."""
        return RowRange(selection["start"], selection["rows"])

    def within(self, selection: Selection, rows: RowRange) -> Selection:
        """Return the part of the slab within these rows, possibly empty."""
        common = rows.common(RowRange(selection["start"], selection["rows"]))
        return {"start": min(common.first - rows.first, rows.count), "rows": common.count}

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """Return the slab, and the rows above and below it."""
        start, rows = selection["start"], selection["rows"]
        parts = [start, rows, param.shape[0] - start - rows]
        above, slab, below = zip(torch.split(param, parts), torch.split(grad, parts), strict=True)
        return Regions(full=slab, free=tuple(Free(*part) for part in (above, below) if len(part[0])))


def _van_der_corput(number: int) -> float:
    """Return the binary digits of a number mirrored behind the point: 0, 1/2, 1/4, 3/4, …; any first n lie evenly."""
    return int(f"{number:b}"[::-1], 2) / 2.0 ** number.bit_length()
