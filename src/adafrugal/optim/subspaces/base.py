"""The interface of a subspace. A subspace holds settings only; its selections are in the optimizer's state."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from adafrugal.optim import choices
from adafrugal.optim.rules import Free

Selection: TypeAlias = Mapping[str, Any]


class Matrix(NamedTuple):
    """The properties of a matrix that a selection among matrices depends on."""

    name: str
    shape: torch.Size
    layer: int | None = None  # index of the transformer block, if known


class RowRange(NamedTuple):
    """Contiguous rows of a matrix."""

    first: int
    count: int  # type: ignore[assignment]  # it hides tuple's method

    def common(self, other: RowRange) -> RowRange:
        """Return the rows in both ranges."""
        first = max(self.first, other.first)
        return RowRange(first, max(0, min(self.first + self.count, other.first + other.count) - first))


@dataclass(frozen=True)
class Period:
    """The time from one refresh to the next; its numbers seed every random choice.

    Nothing is drawn from torch's global generator, so that a resumed run and every rank choose the same.
    """

    seed: int  # the optimizer's
    number: int  # of refreshes so far, this one included
    start: int = 0  # blocks selected in earlier periods; an ordered selection continues from there
    first: int = 0  # index of the group's first matrix among all parameters, so that no two groups draw the same

    def generator(self, place: int | None = None) -> torch.Generator:
        """Return a CPU generator for this period: the group's, or that of the matrix at index `place`."""
        where = f"group {self.first}" if place is None else f"matrix {self.first + place}"
        digest = hashlib.blake2b(f"{self.seed}/{self.number}/{where}".encode(), digest_size=7).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


class Regions(NamedTuple):
    """A matrix's updates by its two rules, which write into the targets; `Subspace.close` completes the matrix."""

    full: tuple[Tensor, Tensor]  # compact target (a view, copied entries, or zeros to hold the update), its gradient
    free: tuple[Free, ...] = ()  # they may cover entries that `close` overwrites


@dataclass(frozen=True)
class Subspace(ABC):
    """Selects the entries of split matrices that keep state. `check_subspace` tries one of your own.

    At a refresh the optimizer calls `shares`, `entries` and `select`; when ρ has fallen since, `shrink` and `narrow`;
    when moments begin or are loaded, `compact`; at every step `regions`, then the rules, then `close`. A selection maps
    each name in `remembers` to a tensor, or to a number if `numbers` has it too. Compact tensors hold the selected
    entries: the targets and gradients that `regions` gives the state-full rule, and the moments.

    If processes share a matrix by rows, each holds the compact tensors of its rows, and `regions` and `close` get the
    selection within these rows (`within`).
    """

    kind: ClassVar[str]
    remembers: ClassVar[tuple[str, ...]] = ()  # the names in a selection; none if matrices are selected whole
    numbers: ClassVar[tuple[str, ...]] = ()  # those of them that are numbers; all others are tensors
    starts_from: ClassVar[tuple[str, ...]] = ()  # the tensors of the old selection that `select` reads
    needs_gradient: ClassVar[bool] = False  # whether `select` reads the gradient's values
    chosen_by_one: ClassVar[bool] = False  # whether one process selects for all that share a matrix
    along_axis: ClassVar[bool] = False  # whether it selects whole lines along `axis`, in ascending order
    in_place: ClassVar[bool] = False  # whether `regions` returns views of the matrix, which need no `close`
    in_batches: ClassVar[bool] = False  # whether it has `project` and `back`, which take many matrices of one shape
    any_shape: ClassVar[bool] = False  # whether vectors can be split too
    grain: ClassVar[float] = 0.0  # the relative fall of ρ beyond which to `shrink` between refreshes

    def __post_init__(self) -> None:
        choices.refuse_settings("subspace", self.kind, vars(self))

    def shares(self, matrices: Sequence[Matrix], density: float, period: Period) -> list[float]:
        """Return the share to select of each matrix; within one period, no larger for a smaller density."""
        return [density] * len(matrices)

    def handed_out(self, matrices: Sequence[Matrix], active: Sequence[bool]) -> int:
        """Return the number of active blocks, by which the next period's `start` advances."""
        return 0

    @abstractmethod
    def entries(self, shape: torch.Size, share: float) -> int:
        """Return the exact number of entries of a matrix of this shape that keep state."""

    @abstractmethod
    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """Select entries of one matrix, on its device; called only if `entries` is not 0.

        Args:
            param: the matrix [n_out, n_in].
            grad: its gradient [n_out, n_in]; None if it has none at this step (never if `needs_gradient`).
            share: of this matrix.
            generator: the only source of randomness.
            old: the previous selection, empty at first; of its tensors only those in `starts_from`, or all with
                `keep_overlap`.
            place: index of the matrix, from 0, among the group's matrices of its shape.
        """

    def blank(self, param: Tensor, share: float) -> Selection:
        """Return a selection with uninitialised tensors, to receive another process's selection (`chosen_by_one`)."""
        raise NotImplementedError(f"{type(self).__name__} defines no blank, which chosen_by_one needs")

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """Return the part of `old` that a smaller share keeps; `generator` is seeded as it was to select `old`."""
        what = f"{type(self).__name__} defines no shrink, by which a falling density gives up a part of a selection"
        raise NotImplementedError(f"{what}; without it set shrink='at_refresh'")

    def axis(self, shape: torch.Size) -> int:
        """Return the axis of compact tensors along which whole units (columns, rows, directions) are selected."""
        return 0

    def positions(self, shape: torch.Size, selection: Selection) -> Tensor:
        """Return the selected units of a matrix of this shape: integers [n], sorted, one a unit of a compact tensor."""
        indices: Tensor = selection["indices"]
        return indices

    def narrow(self, moment: Tensor, shape: torch.Size, old: Selection, new: Selection) -> Tensor:
        """Cut a compact tensor to the part `new` of its selection `old`; return a copy."""
        places = torch.searchsorted(self.positions(shape, old), self.positions(shape, new))
        return moment.index_select(self.axis(shape), places)

    def compact(self, shape: torch.Size, selection: Selection) -> torch.Size:
        """Return the shape of compact tensors."""
        axis, count = self.axis(shape), len(self.positions(shape, selection))
        return torch.Size(count if i == axis else n for i, n in enumerate(shape))

    def row_range(self, shape: torch.Size, selection: Selection) -> RowRange:
        """Return the rows of a sharded matrix that compact tensors cover."""
        return RowRange(0, shape[0])

    def within(self, selection: Selection, rows: RowRange) -> Selection:
        """Return the selection within these rows of the matrix, for the process that holds them."""
        return selection

    @abstractmethod
    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """Return the updates of a matrix [n_out, n_in]; without `residual` the state-free rule ignores its gradient.

        `grad` may be a direction that the state-free rule made of the whole gradient (`StateFree`): then only `free` is
        used. It must be linear in `grad`.
        """

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:  # noqa: B027
        """Write the state-full target back into the matrix, after both rules; do nothing if it is a view."""

    def settings(self) -> dict[str, Any]:
        """Return kind and settings as plain values, as `subspace` reads them."""
        return {"kind": self.kind} | asdict(self)
