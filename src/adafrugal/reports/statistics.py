"""Statistics over seeds: a mean with its spread, and paired differences between arms with an interval."""

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


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of several arms' numbers, seed by seed, such as the paired difference a − b.

    Runs of one seed begin with the same weights and read the same batches, so much of the spread cancels. `low` and
    `high` are the ends of the 95% interval of Student's t over the n seeds that all arms have; None for one seed.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def contrast(numbers: Mapping[str, Mapping[int, float]], coefficients: Mapping[str, float]) -> Contrast | None:
    """Return the sum over arms of coefficient × number (arm -> seed -> number); None if no seed has all arms."""
    if not coefficients.keys() <= numbers.keys():
        return None
    seeds = sorted(set.intersection(*(set(numbers[arm]) for arm in coefficients)))
    if not seeds:
        return None
    sample = Sample.of(sum(c * numbers[arm][seed] for arm, c in coefficients.items()) for seed in seeds)
    if sample.spread is None:
        return Contrast(sample.mean, None, None, 1)
    half = student(sample.n - 1) * sample.spread / math.sqrt(sample.n)
    return Contrast(sample.mean, sample.mean - half, sample.mean + half, sample.n)


def student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t with `freedom` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
