"""How far runs lie apart that differ in their seeds alone: the beginning's, the data order's, or both."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from adafrugal.reports.arms import Job
from adafrugal.reports.grid import MISSING, Cell, Grid

RULE = (
    "Each number is a standard deviation (n − 1) of the final validation loss, with its 95% interval for normally "
    "distributed losses, and the number of runs. `seed` draws weights, dropout and subspaces, `data.seed` the order of "
    "the data; by default it is `seed`."
)
HEAD = ["arm", "both seeds", "`seed` alone", "`data.seed` alone"]


def grid(jobs: Sequence[Job]) -> Grid:
    """Return a row for each arm: its spread over both seeds, over `seed` at one order, over orders at one `seed`."""
    arms: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        arms[job.arm].append(job)
    return Grid(HEAD, [[arm, *_cells(of_arm)] for arm, of_arm in arms.items()])


def _cells(jobs: Sequence[Job]) -> list[str | Cell]:
    """Return the spread of each kind."""
    fixed = [job for job in jobs if job.settings.data.seed is not None]
    at_seed: dict[int, list[float]] = defaultdict(list)  # of several orders
    for job in fixed:
        for seed, loss in zip(job.runs, job.numbers("validation_loss"), strict=True):
            at_seed[seed].append(loss)
    both = [job.numbers("validation_loss") for job in jobs if job not in fixed]
    alone = [job.numbers("validation_loss") for job in fixed]
    return [_spread(max(kind, key=len, default=[])) for kind in (both, alone, at_seed.values())]


def _spread(losses: Sequence[float]) -> str | Cell:
    """Return the standard deviation of losses, with its interval by χ²."""
    from scipy.special import chdtri

    n = len(losses)
    if n < 2:
        return MISSING
    spread = statistics.stdev(losses)
    low, high = (spread * math.sqrt((n - 1) / float(chdtri(n - 1, p))) for p in (0.025, 0.975))
    values = {"": spread, " from": low, " to": high, " n": n}
    return Cell(f"{spread:.4f} [{low:.4f}, {high:.4f}], {n} runs", values)
