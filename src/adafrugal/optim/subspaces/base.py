"""What every subspace answers. A subspace holds settings only; what it selected lives in the optimizer's state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias, get_args, get_type_hints

import torch
from torch import Tensor

Selection: TypeAlias = Mapping[str, Any]
Pair: TypeAlias = tuple[Tensor, Tensor]


class Matrix(NamedTuple):
    """What a choice among matrices may depend on: the name, the shape, and the transformer layer where it is known."""

    name: str
    shape: torch.Size
    layer: int | None = None


class Run(NamedTuple):
    """Neighbouring rows of a matrix: the first, and how many."""

    first: int
    count: int

    def common(self, other: Run) -> Run:
        """The rows of both."""
        first = max(self.first, other.first)
        return Run(first, max(0, min(self.first + self.count, other.first + other.count) - first))


@dataclass(frozen=True)
class Turn:
    """Which choice this is: all that a selection may depend on beside the matrices and the density.

    Nothing is drawn from torch's global generator, so that a resumed run and every rank choose the same.

    Args:
        seed: the optimizer's seed.
        number: how many refreshes there have been, this one included.
        start: how many blocks earlier turns have handed out; an ordered choice goes on from there.
        first: the place of the group's first matrix among all parameters, so that no two groups draw the same.
    """

    seed: int
    number: int
    start: int = 0
    first: int = 0

    def generator(self, place: int | None = None) -> torch.Generator:
        """A CPU generator for this turn: the whole group's, or that of the matrix at a place in it."""
        where = f"group {self.first}" if place is None else f"matrix {self.first + place}"
        digest = hashlib.blake2b(f"{self.seed}/{self.number}/{where}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Free(NamedTuple):
    """What the state-free rule is to update: target and gradient, and a scale on top of the rate (see `rules`)."""

    target: Tensor
    grad: Tensor
    scale: Tensor | None = None


class Regions(NamedTuple):
    """A matrix as its two rules see it. Rules write into the targets; `Subspace.close` then settles the rest.

    Args:
        full: target and gradient of the state-full rule, compact; the target is a view of the matrix, a copy of
            entries, or zeros in which the update is gathered.
        free: targets of the state-free rule; they may cover entries that `close` overwrites.
    """

    full: Pair
    free: tuple[Free, ...] = ()


@dataclass(frozen=True)
class Subspace:
    """Chooses the entries of split matrices that keep state.

    The optimizer asks in this order: at a refresh `shares`, `entries` and `select`; when ρ has fallen since, `shrink`
    and `narrow`; at every step `regions`, then the rules, then `close`. A selection is a mapping of the names in
    `remembers` to tensors, numbers or strings; it is empty where a matrix is selected whole. Compact tensors are
    those of the selected entries: what `regions` gives the state-full rule, and the moments.

    Of a matrix that is divided by rows over processes, each process holds the compact tensors of its own rows, and is
    asked with the selection as seen from there (`within`).

    Class attributes:
        remembers: the names of what a selection consists of.
        needs_gradient: whether `select` looks at the gradient's values.
        chosen_by_one: whether one process chooses for all where a matrix is divided over several.
        in_place: whether `regions` answers with views of the matrix, which need no `close`.
        any_shape: whether vectors can be split too.
        policies: what can become of the moments at a refresh.
        grain: the least relative fall of ρ that is worth a `shrink` between refreshes.
    """

    kind: ClassVar[str]
    remembers: ClassVar[tuple[str, ...]] = ()
    needs_gradient: ClassVar[bool] = False
    chosen_by_one: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    any_shape: ClassVar[bool] = False
    policies: ClassVar[tuple[str, ...]] = ("reset", "reset_all", "keep", "keep_overlap")
    grain: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        allowed = type(self).choices()
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(values)}")

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The settings and what each allows."""
        hints = get_type_hints(cls)
        return {f.name: get_args(hints[f.name]) for f in fields(cls)}

    def shares(self, matrices: Sequence[Matrix], density: float, turn: Turn) -> list[float]:
        """The share of each matrix that is to be selected.

        For one turn, a smaller density gives no matrix a larger share.
        """
        return [density] * len(matrices)

    def handed_out(self, matrices: Sequence[Matrix], active: Sequence[bool]) -> int:
        """How many blocks a turn has had, by which the next turn's `start` moves on."""
        return 0

    def entries(self, shape: torch.Size, share: float) -> int:
        """How many entries of a matrix of this shape keep state: the exact count of this subspace."""
        raise NotImplementedError

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """A new selection in one matrix, on its device. Called only where `entries` is not 0.

        Args:
            param: the matrix.
            grad: its gradient, the same shape; None where it has none at this step (never for a subspace that
                `needs_gradient`).
            share: of this matrix.
            generator: the only source of chance.
            old: the selection so far, without its tensors unless on_refresh is `keep_overlap`; empty at first.
            place: which one it is, from 0, of the group's matrices of its shape.
        """
        raise NotImplementedError

    def blank(self, param: Tensor, share: float) -> Selection:
        """What `select` answers, with tensors that are still to be filled; where it is `chosen_by_one`."""
        raise NotImplementedError

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """A part of `old` that a smaller share leaves; the generator is the one that `old` was selected with."""
        raise NotImplementedError

    def axis(self, shape: torch.Size) -> int:
        """The axis of compact tensors along which whole units (columns, rows, directions) are selected."""
        return 0

    def positions(self, shape: torch.Size, selection: Selection) -> Tensor:
        """Which units of a matrix of this shape are selected: int64, sorted, as many as a compact tensor has."""
        raise NotImplementedError

    def narrow(self, moment: Tensor, shape: torch.Size, old: Selection, new: Selection) -> Tensor:
        """What remains of a compact tensor when `old` shrinks to its part `new`, in storage of its own."""
        places = torch.searchsorted(self.positions(shape, old), self.positions(shape, new))
        return moment.index_select(self.axis(shape), places)

    def compact(self, shape: torch.Size, selection: Selection) -> torch.Size:
        """The shape of compact tensors."""
        axis, count = self.axis(shape), len(self.positions(shape, selection))
        return torch.Size(count if i == axis else n for i, n in enumerate(shape))

    def why_whole(self) -> str | None:
        """Why a process needs the whole of a matrix, to follow "rows" in a message; None where it needs none."""
        return "needs the whole of it"

    def run(self, shape: torch.Size, selection: Selection) -> Run:
        """The rows of a matrix that compact tensors have a row for; of a matrix that is divided by rows."""
        return Run(0, shape[0])

    def within(self, selection: Selection, rows: Run) -> Selection:
        """The selection as seen from a process that has these rows of the matrix and no other."""
        return selection

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """What the state-full rule and the state-free rule are to update.

        Args:
            param: the matrix.
            grad: its gradient.
            selection: in it.
            residual: whether the state-free rule looks at its gradient; one that does not needs none computed.
        """
        raise NotImplementedError

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Bring the state-full target back into the matrix, after both rules; nothing to do where it is a view."""

    def settings(self) -> dict[str, Any]:
        """Kind and settings as plain values, such as `subspace` reads."""
        return {"kind": self.kind} | asdict(self)
