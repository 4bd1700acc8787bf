"""Statistics over seeds: a mean with its spread, interval and p, and sums of several arms' numbers seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A mean over n seeds and the standard deviation (n − 1 in the denominator; None for one seed)."""

    mean: float
    spread: float | None
    n: int

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Sample:
        """Return the sample of one number or more."""
        found = list(numbers)
        return cls(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the mean's 95% interval, by Student's t; None for one seed."""
        from scipy.special import stdtrit

        if self.spread is None:
            return None
        half = float(stdtrit(self.n - 1, 0.975)) * self.spread / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """The two-sided p value of a mean of 0, by Student's t; None for one seed."""
        from scipy.special import stdtr

        if self.spread is None:
            return None
        if self.spread == 0:
            return float(self.mean == 0)
        return 2 * float(stdtr(self.n - 1, -abs(self.mean) * math.sqrt(self.n) / self.spread))


def contrast(numbers: Mapping[str, Mapping[int, float]], coefficients: Mapping[str, float]) -> Sample | None:
    """Return the sum over arms of coefficient × number (arm -> seed -> number), such as the paired difference a − b.

    Runs of one seed begin with the same weights and read the same batches, so much of the spread cancels. None if no
    seed has all arms.
    """
    seeds = sorted(set.intersection(*(set(numbers.get(arm, ())) for arm in coefficients)))
    return Sample.of(sum(c * numbers[arm][s] for arm, c in coefficients.items()) for s in seeds) if seeds else None


def holm(p: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's step-down method (Scand. J. Stat. 6, 1979).

    The k-th smallest of m is multiplied by m − k + 1, and is no smaller than those before it, and at most 1.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted
