"""How the runs of a section become tables: arms side by side, a search over rates, or scores of data sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from adafrugal.reports import scores
from adafrugal.reports.arms import RATES, SHORT, Job
from adafrugal.reports.grid import MISSING, Cell, Difference, Grid, Number
from adafrugal.reports.plan import Section
from adafrugal.reports.selection import STATE, state
from adafrugal.reports.statistics import Sample, contrast
from adafrugal.reports.table import COLUMNS, measured
from adafrugal.settings import compose

PUBLISHED = compose.REPOSITORY / "experiments" / "published"
UNPUBLISHED = "not published here"
DIVERGED = "diverged"  # its loss was no number any more
LR, S, C = RATES
LINES: dict[str, tuple[str, Callable[[Mapping[str, float]], object]]] = {  # through a search: what moves, what stays
    "lr": (LR, lambda rates: (rates.get(S), rates.get(C))),
    "s": (S, lambda rates: (rates[LR], rates.get(C))),
    "c": (C, lambda rates: (rates[LR], rates.get(S))),
    "lr with lr·s": (LR, lambda rates: (f"{rates[LR] * rates.get(S, 1):.6g}", rates.get(C))),  # a valley runs along it
}


def grids(section: Section) -> dict[str, Grid]:
    """The tables of a section, by what stands above each."""
    return KINDS[section.kind](section)


def _comparison(section: Section) -> dict[str, Grid]:
    """A job a row: what it reached, how far from the reference, what it kept, and what is published."""
    losses = {
        job.name: {seed: run.summary()["validation_loss"] for seed, run in job.runs.items()} for job in section.jobs
    }
    is_compared = section.reference in losses
    against = [f"− {section.reference}, 95%"] if is_compared else []
    columns = [_published(name) for name in section.published]
    rows = []
    for job in section.jobs:
        summaries = [run.summary() for run in job.runs.values()]
        none = DIVERGED if job.diverged and not job.runs else MISSING
        found: list[Cell] = measured(summaries) if summaries else [none] * len(COLUMNS)
        if is_compared:
            difference = contrast(losses, {job.name: 1, section.reference: -1})
            cell = "–" if job.name == section.reference else Difference(difference, ".4f") if difference else MISSING
            found.insert(1, cell)
        found.append(state(summaries) if summaries else MISSING)
        for column in columns:
            found += _beside(job, column)
        rows.append([job.name, str(len(job.runs)), *found])
    first, *others = COLUMNS
    head = ["arm", "n", first, *against, *others, STATE]
    for column in columns:
        head += [column["title"], *(["difference"] if column["comparable"] else [])]
    return {"": Grid(head, rows)}


def columns() -> list[str]:
    """The columns of the published tables that there are, as file/column."""
    files = sorted(PUBLISHED.glob("*.yaml"))
    return [f"{file.stem}/{column}" for file in files for column in OmegaConf.load(file).perplexity]


def sources(section: Section) -> str:
    """Where the published values of a section stand."""
    found = [f"{column['title']}: {column['source']}" for column in map(_published, section.published)]
    return f"Sources: {'; '.join(found)}." if found else ""


def _published(name: str) -> dict[str, Any]:
    """A column of a published table, as file/column: its values by arm, what it says, and whether ours compare."""
    file, _, column = name.partition("/")
    found = OmegaConf.to_container(OmegaConf.load(PUBLISHED / f"{file}.yaml"))
    return {
        "title": found["title"],
        "source": found["source"],
        "comparable": found["comparable"],
        "values": found["perplexity"][column],
    }


def _beside(job: Job, column: Mapping[str, Any]) -> list[Cell]:
    """The published value of a job, and the difference of ours to it where both are there and compare."""
    value = column["values"].get(job.name)
    text = UNPUBLISHED if value is None else str(value)
    if not column["comparable"]:
        return [text]
    ours = [run.summary()["validation_perplexity"] for run in job.runs.values()]
    if value is None:
        return [text, "–"]
    return [text, f"{statistics.mean(ours) - value:+.2f}" if ours else MISSING]


def _search(section: Section) -> dict[str, Grid]:
    """The best of each arm's rates, then all of them."""
    arms: dict[str, list[Job]] = {}
    for job in section.jobs:
        arms.setdefault(job.arm, []).append(job)
    best = {arm: min(jobs, key=_loss) if any(job.runs for job in jobs) else None for arm, jobs in arms.items()}
    return {"The best of each arm:": _best(arms, best), "All, by learning rate (–: not tried):": _all(arms, best)}


def _best(arms: Mapping[str, Sequence[Job]], best: Mapping[str, Job | None]) -> Grid:
    """An arm a row: its best rates, and at which of them nothing was tried beyond."""
    rows: list[list[Cell]] = []
    for arm, job in best.items():
        tried = [other for other in arms[arm] if other.runs or other.diverged]
        if job is None:
            rows.append([arm, *[MISSING] * (len(RATES) + 1), str(len(tried)), MISSING])
            continue
        edges = ", ".join(title for title in LINES if _is_at_edge(job, tried, title))
        rows.append([arm, *(_rate(job, name) for name in RATES), _losses(job), str(len(tried)), edges or "no"])
    return Grid(["arm", *(SHORT[name] for name in RATES), "validation loss", "runs", "at an edge"], rows)


def _all(arms: Mapping[str, Sequence[Job]], best: Mapping[str, Job | None]) -> Grid:
    """The loss at all rates: an arm and its scales a row, a learning rate a column."""
    rates = sorted({_rate(job, LR) for jobs in arms.values() for job in jobs}, key=float)
    rows: dict[tuple[str, str, str], dict[str, Job]] = {}
    for arm, jobs in arms.items():
        for job in sorted(jobs, key=lambda job: [-job.rates.get(name, 0) for name in RATES[1:]]):
            rows.setdefault((arm, _rate(job, S), _rate(job, C)), {})[_rate(job, LR)] = job
    lines = [[*row, *(_searched(found.get(rate), best[row[0]]) for rate in rates)] for row, found in rows.items()]
    return Grid(["arm", *(SHORT[name] for name in RATES[1:]), *(f"lr {rate}" for rate in rates)], lines)


def _searched(job: Job | None, best: Job | None) -> Cell:
    if job is None:
        return "–"
    if not job.runs:
        return DIVERGED if job.diverged else MISSING
    return replace(_losses(job), is_best=job is best)


def _losses(job: Job) -> Number:
    return Number(Sample.of(run.summary()["validation_loss"] for run in job.runs.values()), ".4f")


def _rate(job: Job, name: str) -> str:
    """One of a job's rates, as a number is written; – where it has no such rate."""
    return f"{job.rates[name]:g}" if name in job.rates else "–"


def _is_at_edge(best: Job, tried: Sequence[Job], title: str) -> bool:
    """Whether nothing was tried beyond the best on a side of a line through it; a rate that has one value has none."""
    name, stays = LINES[title]
    rates = [job.rates for job in tried if name in job.rates]
    line = [each[name] for each in rates if stays(each) == stays(best.rates)]
    return len({each[name] for each in rates}) > 1 and best.rates[name] in (min(line), max(line))


def _loss(job: Job) -> float:
    return _losses(job).sample.mean if job.runs else math.inf


def _scores(section: Section) -> dict[str, Grid]:
    """Fine-tuning runs: a table at the last epoch and one at the best."""
    runs = [run for job in section.jobs for run in job.runs.values()]
    return {f"{scores.TITLES[when]}:": grid for when, grid in scores.grids(runs).items()} if runs else {}


KINDS = {"comparison": _comparison, "search": _search, "scores": _scores}
