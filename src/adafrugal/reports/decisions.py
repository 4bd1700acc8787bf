"""Decide whether arms end below or above a reference, by a rule that is fixed before the runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adafrugal.reports.arms import Job
from adafrugal.reports.grid import MISSING, NONE, Cell, Grid, difference
from adafrugal.reports.statistics import contrast, holm

if TYPE_CHECKING:
    from adafrugal.reports.plan import Section

SEEDS, LEVEL = 5, 0.05
RULE = (
    "The rule of decision, fixed before the runs: an arm is below or above the reference if the mean of its "
    f"differences, paired by seed, has a two-sided p under {LEVEL} by Student's t, adjusted by Holm's method over all "
    f"other arms of the table. A decision takes at least {SEEDS} seeds, every run that the table plans, and the end of "
    "a search for the rates. Until then an arm has no p and counts as p = 1 in the adjustment; so does an arm if one "
    "of its runs, or of its reference's, diverged. The interval is 95% of the one difference, not adjusted."
)


def grid(section: Section, reference: str) -> Grid:
    """Return a row for each job but the reference: difference of the validation losses, p, adjusted p and verdict."""
    jobs = dict(section.rows)
    base = jobs.pop(reference)
    found = {name: contrast(section.losses, {name: 1, reference: -1}) for name in jobs}
    searched = {each.arm.name for each in section.searches if each.pending}
    undecided = {name: _undecided(job, base, bool(searched & {name, reference})) for name, job in jobs.items()}
    p = {name: sample.p for name, sample in found.items() if sample and not undecided[name]}
    adjusted = dict(zip(jobs, holm([p.get(name, 1.0) for name in jobs]), strict=True))
    rows: list[list[str | Cell]] = []
    for name, sample in found.items():
        shown = difference(sample, ".4f") if sample else MISSING
        row: list[str | Cell] = [jobs[name].name, str(sample.n if sample else 0), shown]
        if name in p:
            side = "below" if sample.mean < 0 else "above"
            row += [_p(p[name]), _p(adjusted[name]), side if adjusted[name] < LEVEL else "not decided"]
        else:
            row += [NONE, NONE, undecided[name]]
        rows.append(row)
    return Grid(["arm", "n", f"− {base.name}, 95%", "p", "p, Holm", "verdict"], rows)


def _undecided(job: Job, base: Job, is_searched: bool) -> str:
    """Return why the runs do not allow a decision; empty if they do."""
    if is_searched:
        return "the search goes on"
    planned, pairs = set(job.seeds) & set(base.seeds), set(job.runs) & set(base.runs)
    if gone := len(planned.intersection(job.diverged + base.diverged)):
        return f"not decided: {gone} diverged"
    needed = max(SEEDS, len(planned))
    return f"{len(pairs)} of {needed} seeds" if len(pairs) < needed else ""


def _p(value: float) -> Cell:
    return Cell(f"{value:.2g}", {"": value})
