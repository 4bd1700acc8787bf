"""The interface of a subspace. A subspace holds settings only; what it selected lives in the optimizer's state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from adafrugal.optim import choices
from adafrugal.optim.rules import Free

Selection: TypeAlias = Mapping[str, Any]


class Matrix(NamedTuple):
    """What a choice among matrices depends on."""

    name: str
    shape: torch.Size
    layer: int | None = None  # number of the transformer block, where it is known


class RowRange(NamedTuple):
    """Neighbouring rows of a matrix."""

    first: int
    count: int

    def common(self, other: RowRange) -> RowRange:
        """The rows of both."""
        first = max(self.first, other.first)
        return RowRange(first, max(0, min(self.first + self.count, other.first + other.count) - first))


@dataclass(frozen=True)
class Period:
    """The time from one refresh to the next: all that a selection may depend on beside matrices and density.

    Nothing is drawn from torch's global generator, so that a resumed run and every rank choose the same.
    """

    seed: int  # the optimizer's
    number: int  # of refreshes so far, this one included
    start: int = 0  # blocks that earlier periods have had; an ordered choice goes on from there
    first: int = 0  # place of the group's first matrix among all parameters, so that no two groups draw the same

    def generator(self, place: int | None = None) -> torch.Generator:
        """A CPU generator for this period: the whole group's, or that of the matrix at a place in it."""
        where = f"group {self.first}" if place is None else f"matrix {self.first + place}"
        digest = hashlib.blake2b(f"{self.seed}/{self.number}/{where}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Regions(NamedTuple):
    """The updates of a matrix by its two rules, which write into the targets; `Subspace.close` settles the rest."""

    full: tuple[Tensor, Tensor]  # compact target (a view, a copy of entries, or zeros that take the update), gradient
    free: tuple[Free, ...] = ()  # they may cover entries that `close` overwrites


@dataclass(frozen=True)
class Subspace:
    """Chooses the entries of split matrices that keep state.

    The optimizer calls, at a refresh, `shares`, `entries` and `select`; when ρ has fallen since, `shrink` and
    `narrow`; at every step `regions`, then the rules, then `close`. A selection is a mapping of the names in
    `remembers` to tensors, numbers or strings; it is empty where a matrix is selected whole. Compact tensors are
    those of the selected entries: what `regions` gives the state-full rule, and the moments.

    Where processes share a matrix by rows, each holds the compact tensors of its own rows, and the selection passed
    to a method is the one seen from there (`within`).
    """

    kind: ClassVar[str]
    remembers: ClassVar[tuple[str, ...]] = ()  # the names in a selection
    needs_gradient: ClassVar[bool] = False  # whether `select` looks at the gradient's values
    chosen_by_one: ClassVar[bool] = False  # whether one process chooses for all that share a matrix
    in_place: ClassVar[bool] = False  # whether `regions` returns views of the matrix, which need no `close`
    any_shape: ClassVar[bool] = False  # whether vectors can be split too
    grain: ClassVar[float] = 0.0  # the least relative fall of ρ that is worth a `shrink` between refreshes

    def __post_init__(self) -> None:
        for name, allowed in choices.SUBSPACES.get(self.kind, {}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")

    def shares(self, matrices: Sequence[Matrix], density: float, period: Period) -> list[float]:
        """The share to select of each matrix; within one period, no larger for a smaller density."""
        return [density] * len(matrices)

    def handed_out(self, matrices: Sequence[Matrix], active: Sequence[bool]) -> int:
        """How many blocks are active, by which the next period's `start` moves on."""
        return 0

    def entries(self, shape: torch.Size, share: float) -> int:
        """How many entries of a matrix of this shape keep state: the exact count of this subspace."""
        raise NotImplementedError

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """A new selection in one matrix, on its device. Called only where `entries` is not 0.

        Args:
            param: the matrix [n_out, n_in].
            grad: its gradient, the same shape; None where it has none at this step (never for a subspace that
                `needs_gradient`).
            share: of this matrix.
            generator: the only source of randomness.
            old: the selection so far, without its tensors unless on_refresh is `keep_overlap`; empty at first.
            place: of the matrix, from 0, among the group's matrices of its shape.
        """
        raise NotImplementedError

    def blank(self, param: Tensor, share: float) -> Selection:
        """A selection with unfilled tensors, for processes that receive another's choice (`chosen_by_one`)."""
        raise NotImplementedError

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """The part of `old` that a smaller share leaves; the generator is the one that `old` was selected with."""
        raise NotImplementedError

    def axis(self, shape: torch.Size) -> int:
        """The axis of compact tensors along which whole units (columns, rows, directions) are selected."""
        return 0

    def positions(self, shape: torch.Size, selection: Selection) -> Tensor:
        """Which units of a matrix of this shape are selected: int64 [n], sorted, one for each of a compact tensor."""
        return selection["indices"]

    def narrow(self, moment: Tensor, shape: torch.Size, old: Selection, new: Selection) -> Tensor:
        """What remains of a compact tensor when `old` shrinks to its part `new`, in storage of its own."""
        places = torch.searchsorted(self.positions(shape, old), self.positions(shape, new))
        return moment.index_select(self.axis(shape), places)

    def compact(self, shape: torch.Size, selection: Selection) -> torch.Size:
        """The shape of compact tensors."""
        axis, count = self.axis(shape), len(self.positions(shape, selection))
        return torch.Size(count if i == axis else n for i, n in enumerate(shape))

    def row_range(self, shape: torch.Size, selection: Selection) -> RowRange:
        """The rows of a sharded matrix for which compact tensors have a row."""
        return RowRange(0, shape[0])

    def within(self, selection: Selection, rows: RowRange) -> Selection:
        """The selection as seen from a process that has only these rows of the matrix."""
        return selection

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """The updates of a matrix [n_out, n_in]; without `residual` the state-free rule ignores its gradient."""
        raise NotImplementedError

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Bring the state-full target back into the matrix, after both rules; nothing to do where it is a view."""

    def settings(self) -> dict[str, Any]:
        """Kind and settings as plain values, as `subspace` reads them."""
        return {"kind": self.kind} | asdict(self)
