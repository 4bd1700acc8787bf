"""Parts as a user may write them: state-free rules that see rows, columns and whole matrices, and a density."""

from dataclasses import dataclass, field
from typing import ClassVar

from adafrugal.optim import Control, StateFree


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


@dataclass
class Trend(Control):
    """A density that falls by a factor whenever a loss is below the mean of the two before, which it keeps."""

    kind: ClassVar[str] = "own_trend"
    start: float = 0.5
    factor: float = 0.8
    every: int | None = 4
    value: float = field(init=False)
    losses: list[float] = field(init=False, default_factory=list)

    def __post_init__(self):
        self.value = self.start

    def at(self, step):
        return self.value

    def observe(self, loss):
        if len(self.losses) == 2 and loss < sum(self.losses) / 2:
            self.value *= self.factor
        self.losses = [*self.losses[-1:], loss]
