"""Parts as a user may write them: state-free rules that see rows, columns and whole matrices."""

from dataclasses import dataclass
from typing import ClassVar

from adafrugal.optim import StateFree


@dataclass(frozen=True)
class _Normed(StateFree):
    eps: float = 1e-8

    def direction(self, grad):
        axis = {"rows": 1, "columns": 0, "matrix": (0, 1)}[self.sees]
        return grad / (grad.square().mean(axis, keepdim=True).sqrt() + self.eps)


class RowNorm(_Normed):
    kind: ClassVar[str] = "own_rownorm"
    sees: ClassVar[str] = "rows"


class ColumnNorm(_Normed):
    kind: ClassVar[str] = "own_colnorm"
    sees: ClassVar[str] = "columns"


class MatrixNorm(_Normed):
    kind: ClassVar[str] = "own_norm"
    sees: ClassVar[str] = "matrix"


@dataclass(frozen=True)
class Cube(StateFree):
    kind: ClassVar[str] = "own_cube"
    sees: ClassVar[str] = "entries"

    def direction(self, grad):
        return grad**3


RULES = (RowNorm(), ColumnNorm(), MatrixNorm(), Cube())
