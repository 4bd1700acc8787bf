"""The steps at which arms reach a reference's loss, from runs of several lengths, each with its whole schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adafrugal.reports.arms import Job
from adafrugal.reports.grid import DIVERGED, MISSING, NONE, Cell, Grid, number
from adafrugal.reports.statistics import Sample, crossing
from adafrugal.system.errors import SettingError

RULE = (
    "Each length is a run of its own with its whole schedule: no number is read off the curve of a longer run. The "
    "last column is the length at which an arm's mean loss is the reference's at its longest, as a share of that "
    "length. Between two lengths the loss is interpolated linearly over the logarithm of the steps. The interval "
    "reaches over the lengths at which the difference, paired by seed and interpolated in the same way, has a 95% "
    "interval with 0 in it. ≤: reached at the shortest length already; >: not reached, or not surely, at the longest."
)


@dataclass(frozen=True)
class Reached:
    """The length at which an arm reaches a loss, and the ends of its interval, as shares of the reference's steps."""

    shortest: float  # the lengths that were run
    longest: float
    share: float  # 0 if the shortest reaches the loss, inf if the longest does not
    interval: tuple[float, float] | None  # ends as `share`; None for one seed
    n: int

    @property
    def cell(self) -> Cell:
        """The cell of a table."""
        low, high = self.interval or (None, None)
        interval = " (1 seed)" if self.interval is None else f" [{self.text(low)}, {self.text(high)}]"
        if low == high == self.share:  # no length within what was run is in doubt
            interval = ""
        numbers = {"": self.share, " low": low, " high": high}
        values = {name: self.text(x) if x in (0, math.inf) else x for name, x in numbers.items()}
        return Cell(f"{self.text(self.share)}{interval}", values | {" n": self.n})

    def text(self, share: float) -> str:
        """Return a share in words, with ≤ or > where it is outside the lengths that were run."""
        outside = {0.0: f"≤ {self.shortest:.0%}", math.inf: f"> {self.longest:.0%}"}
        return outside.get(share, f"{share:.0%}")


def arms(jobs: Sequence[Job]) -> dict[str, dict[int, Job]]:
    """Return arm -> steps -> job, from the shortest; an arm is a job's name without its steps.

    Raises:
        SettingError: a job of some epochs.
    """
    found: dict[str, dict[int, Job]] = defaultdict(dict)
    for job in jobs:
        steps = job.settings.trainer.steps
        if steps is None:
            raise SettingError(f"kind lengths compares trainer.steps, which {job.name} does not set; it has epochs")
        words = [word for word in job.name.split() if word != f"steps={steps}"]
        found[" ".join(words) or job.arm][steps] = job
    return {name: dict(sorted(by_steps.items())) for name, by_steps in found.items()}


def grid(jobs: Sequence[Job], reference: str) -> Grid:
    """Return a row for each arm: its loss at each length, and the share of the reference's steps that it needs."""
    found = arms(jobs)
    whole = max(found[reference])
    lengths = sorted({steps for by_steps in found.values() for steps in by_steps})
    rows: list[list[str | Cell]] = []
    for name, by_steps in found.items():
        at = reached(by_steps, found[reference][whole], whole)
        has_diverged = any(job.diverged for job in (*by_steps.values(), found[reference][whole]))
        unknown = DIVERGED if has_diverged else MISSING
        share = NONE if name == reference else at.cell if at and not has_diverged else unknown
        seeds = _common(by_steps, found[reference][whole])
        losses = (_loss(by_steps.get(steps), seeds) for steps in lengths)
        rows.append([name, str(at.n if at else 0), *losses, share])
    shares = [f"{steps:,} steps ({steps / whole:.0%})" for steps in lengths]
    return Grid(["arm", "n", *shares, f"steps to {reference}'s loss"], rows)


def _loss(job: Job | None, seeds: Sequence[int]) -> str | Cell:
    """Return the mean over these seeds, which an arm has at all lengths; over all if there are none such."""
    if job is None:
        return NONE
    if not job.runs:
        return DIVERGED if job.diverged else MISSING
    return number(Sample.of(_final(job, seed) for seed in seeds or job.runs), ".4f")


def _common(by_steps: Mapping[int, Job], reference: Job) -> list[int]:
    return sorted(set.intersection(*(set(job.runs) for job in (reference, *by_steps.values()))))


def reached(by_steps: Mapping[int, Job], reference: Job, whole: int) -> Reached | None:
    """Return where an arm (steps -> job) reaches the loss of the reference's `whole` steps; None if no seed has all."""
    seeds = _common(by_steps, reference)
    if not seeds:
        return None
    over = {steps: [_final(job, s) - _final(reference, s) for s in seeds] for steps, job in by_steps.items()}
    x, interval = crossing({math.log(steps / whole): differences for steps, differences in over.items()})
    ends = (math.exp(interval[0]), math.exp(interval[1])) if interval else None
    return Reached(min(over) / whole, max(over) / whole, math.exp(x), ends, len(seeds))


def _final(job: Job, seed: int) -> float:
    return float(job.runs[seed].summary()["validation_loss"])
