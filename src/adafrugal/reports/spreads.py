"""How far runs lie apart that differ in their seeds alone: the beginning's, the data order's, or both."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from adafrugal.reports.arms import ARMS, Job
from adafrugal.reports.grid import DIVERGED, MISSING, Cell, Grid
from adafrugal.system.errors import SettingError

RULE = (
    "Each number is a standard deviation (n − 1) of the final validation loss, with its 95% interval for normally "
    "distributed losses, and the number of runs. `seed` draws weights, dropout and subspaces, `data.seed` the order of "
    "the data; by default it is `seed`. Five runs say little of a spread: two such numbers differ at 95% only beyond a "
    "ratio of 3.1. The run of `seed=0 data.seed=0` is in both last columns; it repeats that of `seed=0` in the first."
)
HEAD = ["arm", "both seeds", "`seed` alone", "`data.seed` alone"]
_COMMANDS = "kind spreads takes seed=… data.seed=null,0 and seed=0 data.seed=0,… for each arm"


@dataclass
class Arm:
    """The jobs of an arm by what differs between their runs."""

    both: list[Job] = field(default_factory=list)  # `data.seed` follows `seed`
    seed: list[Job] = field(default_factory=list)  # several values of `seed` at one of `data.seed`
    order: list[Job] = field(default_factory=list)  # one value of `seed` at several of `data.seed`


def arms(jobs: Sequence[Job]) -> dict[str, Arm]:
    """Return the arms by name.

    Raises:
        SettingError: an arm's jobs differ in more than their seeds, or in more than one way.
    """
    found: dict[str, Arm] = defaultdict(Arm)
    for job in jobs:
        if others := job.swept.keys() - {*ARMS, "data.seed"}:
            raise SettingError(f"{_COMMANDS}; {job.name} sweeps {min(others)}, too")
        arm = found[job.arm]
        if job.settings.data.seed is None:
            arm.both.append(job)
        else:
            arm.order.append(job)
            arm.seed += [job] if len(job.seeds) > 1 else []
    for name, arm in found.items():
        if len(arm.both) > 1 or len(arm.seed) > 1:
            raise SettingError(f"{_COMMANDS}; {name} has several seeds at more than one data.seed")
    return dict(found)


def grid(jobs: Sequence[Job]) -> Grid:
    """Return a row for each arm: its spread over both seeds, over `seed` at one order, over orders at one `seed`."""
    return Grid(HEAD, [[name, *_cells(arm)] for name, arm in arms(jobs).items()])


def _cells(arm: Arm) -> list[str | Cell]:
    """Return the spread of each kind."""
    shared = set.intersection(*(set(job.seeds) for job in arm.order)) if arm.order else set()
    whole = [_spread(jobs, list(jobs[0].seeds) if jobs else []) for jobs in (arm.both, arm.seed)]
    return [*whole, _spread(arm.order, sorted(shared)[:1])]


def _spread(jobs: Sequence[Job], seeds: Sequence[int]) -> str | Cell:
    """Return the standard deviation of the losses of some jobs' runs with these seeds, with its interval by χ²."""
    from scipy.special import chdtri

    runs = [job.runs[seed] for job in jobs for seed in seeds if seed in job.runs]
    diverged = sum(seed in job.diverged for job in jobs for seed in seeds)
    n = len(runs)
    if n < 2:
        return DIVERGED if diverged else MISSING
    spread = statistics.stdev(run.summary()["validation_loss"] for run in runs)
    low, high = (spread * math.sqrt((n - 1) / float(chdtri(n - 1, p))) for p in (0.025, 0.975))
    text = f"{spread:.4f} [{low:.4f}, {high:.4f}], {n} runs" + (f", {diverged} diverged" if diverged else "")
    return Cell(text, {"": spread, " from": low, " to": high, " n": n, " diverged": diverged})
