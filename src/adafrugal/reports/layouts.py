"""Lay out a section's tables: arms side by side, a search over rates, or scores of data sets."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from adafrugal.reports import decisions, lengths, table
from adafrugal.reports.arms import RATES, Job
from adafrugal.reports.grid import DIVERGED, MISSING, Cell, Grid, number
from adafrugal.reports.plan import Section
from adafrugal.reports.statistics import Sample
from adafrugal.settings import REPOSITORY
from adafrugal.settings.naming import SHORT

PUBLISHED = REPOSITORY / "experiments" / "published"
LR, S, C = RATES
LINES: dict[str, tuple[str, Callable[[Mapping[str, float]], object]]] = {  # lines through a search: name -> the rate
    "lr": (LR, lambda rates: (rates.get(S), rates.get(C))),  # that varies, and the values that are constant
    "s": (S, lambda rates: (rates[LR], rates.get(C))),
    "c": (C, lambda rates: (rates[LR], rates.get(S))),
    "lr with lr·s": (LR, lambda rates: (f"{rates[LR] * rates.get(S, 1):.6g}", rates.get(C))),  # the valley of the loss
}


def grids(section: Section) -> dict[str, Grid]:
    """Return the tables of a section, by the line above each."""
    decided = {f"Against {name}, paired by seed:": decisions.grid(section, name) for name in section.decisions}
    return KINDS[section.kind](section) | decided | (_searches(section) if section.searches else {})


def _comparison(section: Section) -> dict[str, Grid]:
    """Return a row for each job: results, difference to the reference, optimizer state, published values."""
    losses = {job.name: {s: run.summary()["validation_loss"] for s, run in job.runs.items()} for job in section.jobs}
    is_compared = section.reference in losses
    columns = [_published(name) for name in section.published]
    first, *others = table.COLUMNS
    head = ["arm", "n", first, *([f"− {section.reference}, 95%"] if is_compared else []), *others, table.STATE]
    for column in columns:
        head += [column["title"], *(["difference"] if column["comparable"] else [])]
    rows = []
    for job in section.jobs:
        summaries = [run.summary() for run in job.runs.values()]
        none = DIVERGED if job.diverged and not job.runs else MISSING
        cells: list[str | Cell] = table.measured(summaries) if summaries else [none] * len(table.COLUMNS)
        if is_compared:
            cells.insert(1, table.compared(losses, job.name, section.reference, ".4f"))
        cells.append(table.state(summaries) if summaries else MISSING)
        for column in columns:
            cells += _beside(job, column)
        rows.append([job.name, str(len(job.runs)), *cells])
    return {"": Grid(head, rows)}


def rules(section: Section) -> list[str]:
    """Return paragraphs that say how the numbers of a section's tables were made, where they need it."""
    return [*([lengths.RULE] if section.kind == "lengths" else []), *([decisions.RULE] if section.decisions else [])]


def columns() -> list[str]:
    """Return the names of all columns of published tables, as file/column."""
    files = sorted(PUBLISHED.glob("*.yaml"))
    return [f"{file.stem}/{column}" for file in files for column in OmegaConf.load(file).perplexity]


def sources(section: Section) -> str:
    """Return a line with the sources of a section's published values."""
    found = [f"{column['title']}: {column['source']}" for column in map(_published, section.published)]
    return f"Sources: {'; '.join(found)}." if found else ""


def _published(name: str) -> dict[str, Any]:
    """Return a published table with `values`, arm -> perplexity, of the column named file/column."""
    file, _, column = name.partition("/")
    found = OmegaConf.to_container(OmegaConf.load(PUBLISHED / f"{file}.yaml"))
    return found | {"values": found["perplexity"][column]}


def _beside(job: Job, column: Mapping[str, Any]) -> list[str]:
    """Return a job's published value and, if the settings are comparable, our difference to it."""
    value = column["values"].get(job.name)
    text = "not published here" if value is None else str(value)
    if not column["comparable"]:
        return [text]
    if value is None:
        return [text, "–"]
    ours = job.numbers("validation_perplexity")
    return [text, f"{statistics.mean(ours) - value:+.2f}" if ours else MISSING]


def _search(section: Section) -> dict[str, Grid]:
    """Return a table of each arm's best rates, and one of all rates."""
    arms: dict[str, list[Job]] = defaultdict(list)
    for job in section.jobs:
        arms[job.arm].append(job)
    best = {arm: min(jobs, key=_loss) if any(job.runs for job in jobs) else None for arm, jobs in arms.items()}
    return {"The best of each arm:": _best(arms, best), "All, by learning rate (–: not tried):": _all(arms, best)}


def _searches(section: Section) -> dict[str, Grid]:
    """Return a row for each arm's search: the best rates, and the axes on which no trial lies beyond them."""
    arms = {each.arm.name: each.trials for each in section.searches}
    best = {name: min(jobs, key=_loss, default=None) for name, jobs in arms.items()}
    rows: list[list[str | Cell]] = []
    for each in section.searches:
        seconds = [run.summary()["seconds"]["wall"] for job in each.trials for run in job.runs.values()]
        so_far = " so far" if each.pending else ""
        tried = f"{len(each.trials)} of {each.how.trials}{so_far}", f"{sum(seconds) / 60:.0f}"
        rates = [_rate(each.best, name) for name in RATES]
        found = best[each.arm.name]
        loss = _searched(found, None) if found else MISSING
        rows.append([each.arm.name, *rates, loss, *tried, ", ".join(each.found.open_sides()) or "no"])
    head = ["arm", *(SHORT[name] for name in RATES), "loss", "trials", "minutes", "at an edge"]
    return {"The search for the rates:": Grid(head, rows), "Its trials, by learning rate:": _all(arms, best)}


def _best(arms: Mapping[str, Sequence[Job]], best: Mapping[str, Job | None]) -> Grid:
    """Return a row for each arm: its best rates, and the lines on which they are the smallest or largest tried."""
    rows: list[list[str | Cell]] = []
    for arm, job in best.items():
        tried = [other for other in arms[arm] if other.runs or other.diverged]
        if job is None:
            rows.append([arm, *[MISSING] * (len(RATES) + 1), str(len(tried)), MISSING])
        else:
            edges = ", ".join(title for title in LINES if _is_at_edge(job, tried, title))
            rows.append([arm, *(_rate(job, name) for name in RATES), _losses(job), str(len(tried)), edges or "no"])
    return Grid(["arm", *(SHORT[name] for name in RATES), "validation loss", "runs", "at an edge"], rows)


def _all(arms: Mapping[str, Sequence[Job]], best: Mapping[str, Job | None]) -> Grid:
    """Return a row for each arm and its scales, a column for each learning rate."""
    rates = sorted({_rate(job, LR) for jobs in arms.values() for job in jobs}, key=float)
    rows: dict[tuple[str, str, str], dict[str, Job]] = defaultdict(dict)
    for arm, jobs in arms.items():
        for job in sorted(jobs, key=lambda job: [-job.rates.get(name, 0) for name in (S, C)]):
            rows[arm, _rate(job, S), _rate(job, C)][_rate(job, LR)] = job
    lines = [[*row, *(_searched(found.get(rate), best[row[0]]) for rate in rates)] for row, found in rows.items()]
    return Grid(["arm", SHORT[S], SHORT[C], *(f"lr {rate}" for rate in rates)], lines)


def _searched(job: Job | None, best: Job | None) -> str | Cell:
    if job is None:
        return "–"
    if not job.runs:
        return DIVERGED if job.diverged else MISSING
    return replace(_losses(job), is_best=job is best)


def _losses(job: Job) -> Cell:
    return number(Sample.of(job.numbers("validation_loss")), ".4f")


def _loss(job: Job) -> float:
    return statistics.mean(job.numbers("validation_loss")) if job.runs else math.inf


def _rate(job: Job, name: str) -> str:
    return f"{job.rates[name]:g}" if name in job.rates else "–"


def _is_at_edge(best: Job, tried: Sequence[Job], title: str) -> bool:
    """Return whether the best rate is the smallest or largest tried on a line; a single value has no edge."""
    name, constant = LINES[title]
    rates = [job.rates for job in tried if name in job.rates]
    line = [each[name] for each in rates if constant(each) == constant(best.rates)]
    return len({each[name] for each in rates}) > 1 and best.rates[name] in (min(line), max(line))


def _scores(section: Section) -> dict[str, Grid]:
    """Return the tables of fine-tuning runs: at the last epoch, and at the best."""
    return {f"{table.TITLES[when]}:": grid for when, grid in table.scores(section.runs).items()} if section.runs else {}


def _lengths(section: Section) -> dict[str, Grid]:
    """Return the table of the steps that each arm needs to the reference's loss."""
    return {"": lengths.grid(section.jobs, str(section.reference))}


KINDS = {"comparison": _comparison, "search": _search, "scores": _scores, "lengths": _lengths}
