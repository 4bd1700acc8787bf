"""How the runs of a section become tables: arms side by side, a search over rates, or scores of data sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from adafrugal import composition
from adafrugal.reports import scores
from adafrugal.reports.grid import MISSING, Cell, Difference, Grid
from adafrugal.reports.plan import RATES, SHORT, Job, Section
from adafrugal.reports.rows import STATE, state
from adafrugal.reports.statistics import contrast
from adafrugal.reports.table import COLUMNS, measured

PUBLISHED = composition.REPOSITORY / "experiments" / "published"
UNPUBLISHED = "not published here"


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
        found: list[Cell] = measured(summaries) if summaries else [MISSING] * len(COLUMNS)
        if is_compared:
            difference = contrast(losses, {job.name: 1, section.reference: -1})
            cell = "" if job.name == section.reference else Difference(difference, ".4f") if difference else MISSING
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


def _published(name: str) -> dict[str, Any]:
    """A column of a published table, as file/column: its values by arm, what it says, and whether ours compare."""
    file, _, column = name.partition("/")
    found = OmegaConf.to_container(OmegaConf.load(PUBLISHED / f"{file}.yaml"))
    return {"title": found["title"], "comparable": found["comparable"], "values": found["perplexity"][column]}


def _beside(job: Job, column: Mapping[str, Any]) -> list[Cell]:
    """The published value of a job, and the difference of ours to it where both are there and compare."""
    value = column["values"].get(job.name)
    text = UNPUBLISHED if value is None else str(value)
    if not column["comparable"]:
        return [text]
    ours = [run.summary()["validation_perplexity"] for run in job.runs.values()]
    return [
        text,
        f"{statistics.mean(ours) - value:+.2f}" if ours and value is not None else MISSING if not ours else "",
    ]


def _search(section: Section) -> dict[str, Grid]:
    """The best of each arm's rates, then all of them."""
    arms: dict[str, list[Job]] = {}
    for job in section.jobs:
        arms.setdefault(job.arm, []).append(job)
    best = {arm: min(jobs, key=_loss) for arm, jobs in arms.items()}
    return {"The best of each arm:": _best(arms, best), "All, by learning rate (–: not tried):": _all(arms, best)}


def _best(arms: Mapping[str, Sequence[Job]], best: Mapping[str, Job]) -> Grid:
    """An arm a row: its best rates, and at which of them nothing was tried beyond."""
    rows: list[list[Cell]] = []
    for arm, job in best.items():
        loss, runs = _loss(job), sum(bool(other.runs) for other in arms[arm])
        edges = ", ".join(SHORT[name] for name in RATES if _is_at_edge(job, arms[arm], name))
        found = f"{loss:.4f}" if math.isfinite(loss) else MISSING
        rows.append([arm, *(_rate(job, name) for name in RATES), found, str(runs), edges or "no"])
    return Grid(["arm", *(SHORT[name] for name in RATES), "validation loss", "runs", "at an edge"], rows)


def _all(arms: Mapping[str, Sequence[Job]], best: Mapping[str, Job]) -> Grid:
    """The loss at all rates: an arm and its scales a row, a learning rate a column."""
    rates = sorted({_rate(job, RATES[0]) for jobs in arms.values() for job in jobs}, key=float)
    rows: dict[tuple[str, str, str], dict[str, Job]] = {}
    for arm, jobs in arms.items():
        for job in sorted(jobs, key=lambda job: [-float(_rate(job, name)) for name in RATES[1:]]):
            rows.setdefault((arm, _rate(job, RATES[1]), _rate(job, RATES[2])), {})[_rate(job, RATES[0])] = job
    lines = [[*row, *(_searched(found.get(rate), best[row[0]]) for rate in rates)] for row, found in rows.items()]
    return Grid(["arm", *(SHORT[name] for name in RATES[1:]), *(f"lr {rate}" for rate in rates)], lines)


def _searched(job: Job | None, best: Job) -> str:
    if job is None:
        return "–"
    loss = _loss(job)
    return MISSING if not math.isfinite(loss) else f"**{loss:.4f}**" if job is best else f"{loss:.4f}"


def _rate(job: Job, name: str) -> str:
    """One of a job's rates, as a number is written: swept, or what its settings say."""
    return f"{float(job.rates[name]):g}"


def _is_at_edge(best: Job, jobs: Sequence[Job], name: str) -> bool:
    """Whether nothing was tried beyond a best rate, all other rates being the same."""
    others = [other for other in RATES if other != name]
    line = [float(_rate(job, name)) for job in jobs if all(_rate(job, o) == _rate(best, o) for o in others)]
    return len(line) > 1 and float(_rate(best, name)) in (min(line), max(line))


def _loss(job: Job) -> float:
    runs = list(job.runs.values())
    return statistics.mean(run.summary()["validation_loss"] for run in runs) if runs else math.inf


def _scores(section: Section) -> dict[str, Grid]:
    """Fine-tuning runs: a table at the last epoch and one at the best."""
    runs = [run for job in section.jobs for run in job.runs.values()]
    return {f"{scores.TITLES[when]}:": grid for when, grid in scores.grids(runs).items()} if runs else {}


KINDS = {"comparison": _comparison, "search": _search, "scores": _scores}
