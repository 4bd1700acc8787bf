"""Arms at the best of what was tried: of settings that a section's commands sweep, or another section's rates."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adafrugal.reports.arms import RATES, Job, row_name
from adafrugal.reports.grid import DIVERGED, MISSING, NONE, Cell, Grid, number
from adafrugal.reports.statistics import Sample
from adafrugal.settings.naming import SHORT, short

if TYPE_CHECKING:
    from adafrugal.reports.plan import Section


def arms(jobs: Sequence[Job], settings: Sequence[str]) -> dict[str, list[Job]]:
    """Return the jobs that differ in these settings alone, by their arm's name."""
    found: dict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in jobs:
        rest = {name: value for name, value in job.swept.items() if name not in settings}
        found[job.arm, row_name(rest) or job.arm].append(job)
    count = Counter(name for _, name in found)
    return {name if count[name] == 1 else f"{arm} {name}": group for (arm, name), group in found.items()}


def loss(job: Job) -> float:
    """Return the mean loss over a job's seeds; infinity if one diverged, or none is there."""
    return statistics.mean(job.numbers("validation_loss")) if job.runs and not job.diverged else math.inf


def best(jobs: Sequence[Job]) -> Job | None:
    """Return the job of the smallest mean loss, of those with the most seeds; None without runs."""
    most = max((len(job.runs) for job in jobs), default=0)
    found = [job for job in jobs if job.runs and len(job.runs) == most and not job.diverged]
    return min(found, key=loss, default=None)


def of_section(section: Section) -> dict[str, Job | None]:
    """Return the arms of a section that searches rates, each at its best so far; None without runs."""
    if section.searches:
        return {each.arm.name: each.best if each.trials else None for each in section.searches}
    groups = by_arm(section.jobs) if section.kind == "search" else arms(section.jobs, section.best_of)
    return {name: best(group) for name, group in groups.items()}


def by_arm(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Return the jobs by their arm."""
    found: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        found[job.arm].append(job)
    return found


def row(jobs: Sequence[Job], name: str) -> Job:
    """Return the row of an arm: its best job; without runs a job that has all of its missing seeds."""
    if len(jobs) == 1:
        return replace(jobs[0], name=name)
    found = best(jobs)
    seeds = tuple(dict.fromkeys(seed for job in jobs for seed in job.seeds))
    diverged = tuple(seed for seed in seeds if all(seed in job.diverged for job in jobs))
    return replace(found or replace(jobs[0], seeds=seeds, runs={}, diverged=diverged), name=name)


# -- a grid ------------------------------------------------------------------------------------------------------------


def grid(section: Section) -> Grid:
    """Return the mean losses of a section's grid: a row for each arm, a column for each combination of values."""
    groups = section.groups
    values = {_values(job, section.best_of) for group in groups.values() for job in group}
    columns = sorted(values, key=lambda value: [_order(each) for each in value])
    rows: list[list[str | Cell]] = []
    for name, group in groups.items():
        found = {_values(job, section.best_of): job for job in group}
        chosen = best(group)
        cells = (cell(found.get(column), chosen) for column in columns)
        at_edge = ", ".join(edges(group, section.best_of)) or "no"
        rows.append([section.shown(name), *cells, NONE if chosen is None else at_edge])
    return Grid(["arm", *(_titled(section.best_of, column) for column in columns), "at an edge"], rows)


def rule(section: Section) -> str:
    """Return how a section's rows were chosen, and what that does to the numbers."""
    found = {section.shown(name): best(group) for name, group in section.groups.items()}
    chosen = ", ".join(f"{name}: {at(job, section.best_of)}" for name, job in found.items() if job)
    at_edge = {section.shown(name): edges(group, section.best_of) for name, group in section.groups.items()}
    beyond = ", ".join(f"{name} ({', '.join(of)})" for name, of in at_edge.items() if of)
    return (
        f"Each arm is at the {' and '.join(map(short, section.best_of))} of its smallest mean loss"
        f"{f' ({chosen})' if chosen else ''}. The same seeds chose it and are shown, so a row is a little below what "
        "fresh seeds would give, the more so the more was tried."
        f"{f' At an edge, so that the best may lie beyond what was tried: {beyond}.' if beyond else ''}"
    )


def edges(jobs: Sequence[Job], settings: Sequence[str]) -> list[str]:
    """Return the settings of which the best job has the smallest or the largest value that was tried beside it."""
    found, tried = best(jobs), [job for job in jobs if job.runs or job.diverged]
    at_edge = []
    for place, name in enumerate(settings if found else ()):
        mine = _values(found, settings)
        beside = [_values(job, settings) for job in tried]
        line = sorted({each[place] for each in beside if _without(each, place) == _without(mine, place)}, key=_order)
        if len(line) > 1 and mine[place] in (line[0], line[-1]):
            at_edge.append(short(name))
    return at_edge


def _without(values: Sequence[str], place: int) -> Sequence[str]:
    return [*values[:place], *values[place + 1 :]]


def _values(job: Job, settings: Sequence[str]) -> tuple[str, ...]:
    """Return a job's values as its command types them, numbers in one spelling."""
    typed = dict(word.split("=", 1) for word in shlex.split(job.command))
    return tuple(_spelled(typed.get(name, "as it comes")) for name in settings)


def at(job: Job, settings: Sequence[str]) -> str:
    """Return a job's values of these settings in short, such as lr 0.001."""
    return _titled(settings, _values(job, settings))


def _titled(settings: Sequence[str], values: Sequence[str]) -> str:
    return " ".join(f"{short(name)} {value}" for name, value in zip(settings, values, strict=True))


def _spelled(value: str) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


def _order(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def cell(job: Job | None, chosen: Job | None = None) -> str | Cell:
    """Return a job's loss, in bold if it was chosen."""
    if job is None:
        return NONE
    if not job.runs:
        return DIVERGED if job.diverged else MISSING
    return replace(number(Sample.of(job.numbers("validation_loss")), ".4f"), is_best=job is chosen)


def not_searched(section: Section, searched: Container[str]) -> str:
    """Return what a search leaves as it is: β, momentum, weight decay and other rates than those `searched`."""
    found: dict[str, list[str]] = defaultdict(list)
    for job in section.jobs:
        optimizer, parts = job.settings.optimizer, []
        if betas := getattr(optimizer, "betas", None):
            parts.append(f"β {', '.join(f'{beta:g}' for beta in betas)}")
        if momentum := getattr(optimizer, "momentum", None):
            parts.append(f"momentum {momentum:g}")
        parts.append(f"weight decay {getattr(optimizer, 'weight_decay', 0.0):g}")
        parts += [f"{SHORT[name]} {rate:g}" for name, rate in job.rates.items() if name not in searched]
        if (name := section.shown(job.arm)) not in found[", ".join(parts)]:
            found[", ".join(parts)].append(name)
    *others, usual = sorted(found, key=lambda what: len(found[what]))
    said = [f"{', '.join(found[what])}: {what}" for what in others]
    return f"Not searched: {'; '.join([*said, f'the others: {usual}' if said else usual])}."


# -- another section's rates -------------------------------------------------------------------------------------------


def at_rates(jobs: Sequence[Job], found: Mapping[str, Job | None]) -> tuple[list[Job], list[str]]:
    """Return the jobs at the best rates of their row's or arm's name, and the names of those that have none yet."""
    made = {job.name: found.get(job.name) or found.get(job.arm) for job in jobs}
    waiting = [name for name, chosen in made.items() if chosen is None]
    return [job.at(made[job.name].rates, job.seeds) if made[job.name] else job for job in jobs], waiting


def rates_rule(section: Section) -> str:
    """Return the rates that a section took from another, and the seeds that chose them."""
    source, jobs = section.rates["from"], [job for job in section.jobs if job.name not in section.waiting]
    listed = "; ".join(f"{job.name} {rates_of(job)}" for job in jobs)
    seeds = {seed for job in of_section(section.source).values() if job for seed in job.runs}
    if section.source.searches:
        seeds = {seed for each in section.source.searches for seed in each.how.seeds}
    chose = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))} chose them"
    both = sorted(seeds & {seed for job in jobs for seed in job.seeds})
    shared = f"; {', '.join(map(str, both))} of these are in this table, too" if both else ""
    return f"Rates are the best of {source} ({listed}); {chose}{shared}." if jobs else ""


def rates_of(job: Job) -> str:
    """Return a job's rates in short."""
    return ", ".join(f"{SHORT[name]} {job.rates[name]:g}" for name in RATES if name in job.rates)
