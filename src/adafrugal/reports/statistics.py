"""Statistics over seeds: a mean with its spread, interval and p, and sums of several arms' numbers seed by seed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PARTS = 200  # of the way between two points of a curve, to find the ends of an interval


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


def crossing(curve: Mapping[float, Sequence[float]]) -> tuple[float, tuple[float, float] | None]:
    """Return the x at which the mean of several seeds' curves first falls to 0, and its 95% interval.

    Between neighbouring x the curves are straight. The interval reaches from the first to the last x at which the
    mean's own interval contains 0; with one seed it is None. −inf stands for the first x or any before it, and inf for
    any after the last; as an end of the interval, for the last, too.

    Args:
        curve: x -> a number for each seed.
    """
    xs = sorted(curve)
    samples, crossings = {x: Sample.of(curve[x]) for x in xs}, []
    for x, after in itertools.pairwise(xs):
        first, last = samples[x].mean, samples[after].mean
        shares = [part / PARTS for part in range(1, PARTS)]
        if first > 0 >= last:
            shares.append(first / (first - last))
            crossings.append(_between(x, after, shares[-1]))
        for share in shares:
            numbers = (_between(*pair, share) for pair in zip(curve[x], curve[after], strict=True))
            samples[_between(x, after, share)] = Sample.of(numbers)
    at = -math.inf if samples[xs[0]].mean <= 0 else crossings[0] if crossings else math.inf
    intervals = {x: sample.interval for x, sample in samples.items()}
    if None in intervals.values():
        return at, None
    open_at = [x for x, ends in intervals.items() if ends[0] <= 0 <= ends[1]] or [at]
    low, high = min(open_at), max(open_at)
    return at, (min(at, -math.inf if low == xs[0] else low), max(at, math.inf if high == xs[-1] else high))


def _between(one: float, other: float, share: float) -> float:
    return (1 - share) * one + share * other


def holm(p: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's step-down method (Scand. J. Stat. 6, 1979).

    The k-th smallest of m is multiplied by m − k + 1, and is no smaller than those before it, and at most 1.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted
