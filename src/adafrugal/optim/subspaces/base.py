"""What every subspace answers. A subspace holds settings only; what it selected lives in the optimizer's state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """Which choice this is: all that a selection may depend on beside the matrices and the density.

    Nothing is drawn from torch's global generator, so that a resumed run and every rank choose the same.

    Args:
        seed: the optimizer's seed.
        number: how many refreshes there have been, this one included.
        start: how many matrices earlier turns have handed out; an ordered choice goes on from there.
    """

    seed: int
    number: int
    start: int

    def generator(self, place: str) -> torch.Generator:
        """A CPU generator of its own for each (seed, turn, place)."""
        digest = hashlib.blake2b(f"{self.seed}/{self.number}/{place}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Subspace:
    """Chooses the entries of split matrices that keep state, and moves them to and from a compact tensor.

    A selection is a mapping of names to tensors (`{"indices": …}`); empty where the whole matrix is selected.
    For one turn, the entries selected at a smaller density are among those selected at a larger one: that is what
    lets ρ fall between refreshes while the entries that remain keep their moments.
    """

    kind: ClassVar[str]

    def shares(self, sizes: Sequence[int], density: float, turn: Turn) -> list[float]:
        """The share of each matrix that is selected; `sizes` are the matrices' numbers of entries."""
        return [density] * len(sizes)

    def entries(self, shape: torch.Size, share: float) -> int:
        """How many entries of a matrix of this shape keep state: the exact count of this subspace."""
        raise NotImplementedError

    def select(self, matrix: Tensor, share: float, generator: torch.Generator) -> dict[str, Tensor]:
        """The selection in one matrix, on its device. Called only where `entries` is not 0."""
        raise NotImplementedError

    def take(self, tensor: Tensor, selection: Mapping[str, Tensor]) -> Tensor:
        """The selected part of a tensor of the matrix's shape, as a compact copy."""
        raise NotImplementedError

    def put(self, tensor: Tensor, part: Tensor, selection: Mapping[str, Tensor]) -> None:
        """Write a compact part back into its place in `tensor`."""
        raise NotImplementedError

    def narrow(self, part: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
        """What remains of a compact part when the selection shrinks from `old` to `new`, in storage of its own."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Kind and settings as plain values, such as `subspace` reads."""
        return {"kind": self.kind} | asdict(self)
