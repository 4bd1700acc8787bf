"""Statistics over seeds: a mean with its spread and interval, and sums of several arms' numbers seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
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


def contrast(numbers: Mapping[str, Mapping[int, float]], coefficients: Mapping[str, float]) -> Sample | None:
    """Return the sum over arms of coefficient × number (arm -> seed -> number), such as the paired difference a − b.

    Runs of one seed begin with the same weights and read the same batches, so much of the spread cancels. None if no
    seed has all arms.
    """
    seeds = sorted(set.intersection(*(set(numbers.get(arm, ())) for arm in coefficients)))
    return Sample.of(sum(c * numbers[arm][s] for arm, c in coefficients.items()) for s in seeds) if seeds else None
