"""Numbers of several seeds: means with their spread, and differences between arms with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """A mean over seeds.

    Args:
        mean: of them.
        spread: their standard deviation (n − 1 in the denominator); None of a single one.
        n: how many.
    """

    mean: float
    spread: float | None
    n: int

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Sample:
        """The sample of one number or more."""
        found = list(numbers)
        return cls(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Contrast:
    """A sum of several arms' numbers, each times a coefficient, seed by seed: a paired difference, where it is a − b.

    Runs of one seed begin with the same weights and read the same batches, so that much of the spread cancels.

    Args:
        mean: over the seeds that all arms have.
        low: the lower end of the 95% interval of Student's t; None of a single seed.
        high: its upper end.
        n: seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def contrast(numbers: Mapping[str, Mapping[int, float]], coefficients: Mapping[str, float]) -> Contrast | None:
    """The contrast of arms; None where no seed has all of them.

    Args:
        numbers: arm -> seed -> number.
        coefficients: arm -> what its numbers are multiplied by.
    """
    if not all(arm in numbers for arm in coefficients):
        return None
    seeds = set.intersection(*(set(numbers[arm]) for arm in coefficients))
    if not seeds:
        return None
    sums = [sum(c * numbers[arm][seed] for arm, c in coefficients.items()) for seed in sorted(seeds)]
    sample = Sample.of(sums)
    if sample.spread is None:
        return Contrast(sample.mean, None, None, 1)
    half = student(sample.n - 1) * sample.spread / math.sqrt(sample.n)
    return Contrast(sample.mean, sample.mean - half, sample.mean + half, sample.n)


def student(freedom: int) -> float:
    """The quantile of Student's t with so many degrees of freedom that leaves 2.5% above it."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))
