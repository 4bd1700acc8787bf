"""A search for the best rates of an arm: coordinate descent, replayed from the losses of its trials.

Each axis is the rate of one kind of tensors, and moves no other: lr of those outside the split matrices; lr·s of the
split matrices, or of the part of them that keeps state; lr·s·c of the part that keeps none. On each axis in turn the
search tries both neighbours of the best point so far, and moves on while one of them is better, so that the grid widens
by itself. Steps are factors of 2 until no neighbour is better, then of √2. The search ends when none is better, or when
the trials are spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

Rates: TypeAlias = Mapping[str, float]  # lr, s and perhaps c, by the names of their settings
Point: TypeAlias = tuple[int, ...]  # half-octaves from the start: of lr·s, lr, and perhaps lr·s·c

LR, S, C = RATES = "optimizer.lr", "optimizer.split_lr_scale", "optimizer.state_free_lr_scale"
AXES = "lr·s", "lr", "lr·s·c"
STEPS = 2, 1  # half-octaves


class _Unknown(Exception):  # no error
    """Some trials have no loss yet."""


@dataclass
class Descent:
    """The state of a search, as far as the losses of its trials are known.

    Args:
        start: the rates to begin with.
        trials: the most that may be tried.
        loss: returns the validation loss at the end of a trial; infinity if it diverged; None if it is not made yet.
    """

    start: Rates
    trials: int
    loss: Callable[[Rates], float | None]
    tried: dict[Point, float] = field(default_factory=dict)  # in the order of the search
    pending: list[Point] = field(default_factory=list)  # what the search must know to go on
    is_cut_off: bool = False  # its trials were spent before no neighbour was better

    def __post_init__(self) -> None:
        """Replay the search up to the first unknown loss."""
        with suppress(_Unknown):
            self._run()

    @property
    def best(self) -> Point:
        """The point of the smallest loss; the start before any is known."""
        return min(self.tried, key=self.tried.__getitem__, default=self._origin)

    def rates(self, point: Point) -> dict[str, float]:
        """Return the rates at a point, to six digits."""
        matrices, others, *free = point
        halves = dict(zip(RATES, (others, matrices - others, *(each - matrices for each in free)), strict=False))
        return {name: float(f"{self.start[name] * 2 ** (half / 2):.6g}") for name, half in halves.items()}

    def open_sides(self) -> list[str]:
        """Return the axes on which no trial lies below the best point, or none above it."""
        lines = {name: [point[axis] for point in self.line(axis)] for axis, name in self.axes.items()}
        ends = {name: (min(line, default=0), max(line, default=0)) for name, line in lines.items()}
        return [name for axis, name in self.axes.items() if self.best[axis] in ends[name]]

    @property
    def axes(self) -> dict[int, str]:
        """The axes' names by their place in a point."""
        return dict(zip(range(len(self.start)), AXES, strict=False))

    def line(self, axis: int) -> list[Point]:
        """Return the trials that differ from the best point on one axis at most, along that axis."""
        return sorted(point for point in self.tried if _moved(point, axis, self.best[axis] - point[axis]) == self.best)

    @property
    def _origin(self) -> Point:
        return (0,) * len(self.start)

    def _run(self) -> None:
        self._try(self._origin)
        for step in STEPS:
            before = None
            while before != self.best:  # a round over all axes
                before = self.best
                for axis in self.axes:
                    self._follow(axis, step)

    def _follow(self, axis: int, step: int) -> None:
        """Move along an axis as long as the loss falls."""
        before = None
        while before != self.best:
            before = self.best
            self._try(_moved(before, axis, -step), _moved(before, axis, step))

    def _try(self, *points: Point) -> None:
        wanted = [point for point in points if point not in self.tried]
        new = wanted[: self.trials - len(self.tried)]
        self.is_cut_off |= len(new) < len(wanted)
        known = {point: self.loss(self.rates(point)) for point in new}
        self.pending = [point for point, loss in known.items() if loss is None]
        if self.pending:
            raise _Unknown
        self.tried |= {point: loss for point, loss in known.items() if loss is not None}


def _moved(point: Point, axis: int, step: int) -> Point:
    return (*point[:axis], point[axis] + step, *point[axis + 1 :])
