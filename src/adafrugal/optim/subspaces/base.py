"""What every subspace answers. A subspace holds settings only; what it selected lives in the optimizer's state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

Selection: TypeAlias = Mapping[str, Tensor]
Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Turn:
    """Which choice this is: all that a selection may depend on beside the matrices and the density.

    Nothing is drawn from torch's global generator, so that a resumed run and every rank choose the same.

    Args:
        seed: the optimizer's seed.
        number: how many refreshes there have been, this one included.
        start: how many matrices earlier turns have handed out; an ordered choice goes on from there.
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


@dataclass(frozen=True)
class Regions:
    """A matrix as its two rules see it. Rules write into the targets; `Subspace.close` then settles the rest.

    Args:
        full: target and gradient of the state-full rule, compact; the target may be a view, a copy or a zero tensor.
        free: targets and gradients of the state-free rule; they may cover entries that `close` overwrites.
    """

    full: Pair
    free: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Subspace:
    """Chooses the entries of split matrices that keep state.

    The optimizer asks in this order: at a refresh `shares`, `entries` and `select`; when ρ has fallen since, `shrink`
    and `narrow`; at every step `regions`, then the rules, then `close`. A selection is a mapping of the names in
    `tensors` to tensors; it is empty where a matrix is selected whole.
    """

    kind: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]] = ()

    def shares(self, matrices: Sequence[tuple[str, torch.Size]], density: float, turn: Turn) -> list[float]:
        """The share of each matrix that is to be selected; matrices come with their names and shapes.

        For one turn, a smaller density gives no matrix a larger share.
        """
        return [density] * len(matrices)

    def entries(self, shape: torch.Size, share: float) -> int:
        """How many entries of a matrix of this shape keep state: the exact count of this subspace."""
        raise NotImplementedError

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection
    ) -> Selection:
        """A new selection in one matrix, on its device. Called only where `entries` is not 0.

        Args:
            param: the matrix.
            grad: its gradient, the same shape; None where it has none at this step.
            share: of this matrix.
            generator: the only source of chance.
            old: the selection so far; empty at first.
        """
        raise NotImplementedError

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """A part of `old` that a smaller share leaves; the generator is the one that `old` was selected with."""
        raise NotImplementedError

    def narrow(self, moment: Tensor, old: Selection, new: Selection) -> Tensor:
        """What remains of a compact moment when `old` shrinks to `new`, in storage of its own."""
        raise NotImplementedError

    def regions(self, param: Tensor, grad: Tensor, selection: Selection) -> Regions:
        """What the state-full rule and the state-free rule are to update."""
        raise NotImplementedError

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Bring the state-full target back into the matrix, after both rules; nothing to do where it is a view."""

    def settings(self) -> dict[str, Any]:
        """Kind and settings as plain values, such as `subspace` reads."""
        return {"kind": self.kind} | asdict(self)
