"""Lay out a section's tables: arms side by side, a search over rates, or scores of data sets."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from adafrugal.reports import best, decisions, lengths, searches, spreads, table
from adafrugal.reports.arms import RATES, Job
from adafrugal.reports.cells import COLUMNS, compared
from adafrugal.reports.grid import DIVERGED, MISSING, NONE, Cell, Grid
from adafrugal.settings import REPOSITORY
from adafrugal.settings.naming import SHORT

if TYPE_CHECKING:
    from adafrugal.reports.page_file import SectionFile
    from adafrugal.reports.plan import Section

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
    found = KINDS[section.kind](section)
    if section.best_of:
        found["Everything that was tried, by its validation loss:"] = best.grid(section)
    found |= {f"Against {section.shown(name)}, paired by seed:": decisions.grid(section, name)
              for name in section.decisions}  # fmt: skip
    return found | (_searches(section) if section.searches else {})


def columns(section: SectionFile, sections: Sequence[SectionFile]) -> list[str]:
    """Return the names that `columns` of a section may have, beside these sections of its page."""
    names = ["n", "difference", *COLUMNS]
    if section.kind != "side_by_side":
        return names
    return [f"{other.name}/{name}" for other in sections if other.kind == "comparison" for name in names]


def _comparison(section: Section) -> dict[str, Grid]:
    """Return a row for each arm: results, difference to the reference, optimizer state, published values."""
    published = [_published(name) for name in section.published]
    head = ["arm", *(title for column in section.columns for title in _titles(section, column))]
    for column in published:
        head += [column["title"], *(["difference"] if column["comparable"] else [])]
    rows = []
    for name, job in section.rows.items():
        cells = [cell for column in section.columns for cell in _cells(section, name, column)]
        rows.append([job.name, *cells, *(cell for column in published for cell in _beside(name, job, column))])
    return {"": Grid(head, rows)}


def _titles(section: Section, column: str) -> list[str]:
    """Return the titles of a named column: one for each reference if it is the difference."""
    if column == "difference":
        return [f"− {section.shown(name)}, 95%" for name in section.references]
    return ["n" if column == "n" else COLUMNS[column].title]


def _cells(section: Section, name: str, column: str) -> list[str | Cell]:
    """Return the cells of a row (by its own name) in a named column."""
    if column == "difference":
        return [compared(section.losses, name, other, ".4f") for other in section.references]
    job = section.rows[name]
    if column == "n":
        return [str(len(job.runs))]
    if job.runs:
        return [COLUMNS[column].cell([run.summary() for run in job.runs.values()])]
    return [DIVERGED if job.diverged else MISSING]


def _side_by_side(section: Section) -> dict[str, Grid]:
    """Return a row for each arm, with columns of several sections of the page."""
    columns = [(section.beside[place], column) for place, _, column in (c.partition("/") for c in section.columns)]
    titles = [(other, column, _titles(other, column)) for other, column in columns]
    head = ["arm", *(f"{other.name.replace('_', ' ')}: {title}" for other, _, of in titles for title in of)]
    names = dict.fromkeys(name for other, _ in columns for name in other.rows)
    chosen = [name for name in section.arms if name in names] or names
    rows: list[list[str | Cell]] = []
    for name in chosen:
        row: list[str | Cell] = [section.arms.get(name) or columns[0][0].shown(name)]
        for other, column, of in titles:
            row += _cells(other, name, column) if name in other.rows else [NONE] * len(of)
        rows.append(row)
    return {"": Grid(head, rows)}


def rules(section: Section) -> list[str]:
    """Return paragraphs that say how the numbers of a section's tables were made, where they need it."""
    is_searched = section.kind == "search" or section.search or section.best_of or section.source
    return [
        *([lengths.RULE] if section.kind == "lengths" else []),
        *([spreads.RULE] if section.kind == "spreads" else []),
        *([decisions.RULE] if section.decisions else []),
        *([searches.RULE] if section.searches else []),
        *([best.rule(section)] if section.best_of else []),
        *([best.rates_rule(section)] if section.source else []),
        *([best.not_searched(section, section.best_of or RATES)] if is_searched else []),
    ]


def diverged(section: Section) -> str:
    """Return a line with the runs whose loss diverged beside others of their arm, so that they are in no mean."""
    found = [f"{job.name} (seed{'s' if len(job.diverged) > 1 else ''} {', '.join(map(str, job.diverged))})"
             for job in section.jobs if job.diverged and job.runs]  # fmt: skip
    return f"Diverged, and in no mean: {', '.join(found)}." if found else ""


def published() -> list[str]:
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


def _beside(name: str, job: Job, column: Mapping[str, Any]) -> list[str]:
    """Return a row's published value and, if the settings are comparable, our difference to it."""
    value = column["values"].get(name)
    text = "not published here" if value is None else str(value)
    if not column["comparable"]:
        return [text]
    if value is None:
        return [text, NONE]
    ours = job.numbers("validation_perplexity")
    return [text, f"{statistics.mean(ours) - value:+.2f}" if ours else MISSING]


def _search(section: Section) -> dict[str, Grid]:
    """Return a table of each arm's best rates, and one of all rates."""
    arms = best.by_arm(section.jobs)
    found = best.of_section(section)
    return {"The best of each arm:": _best(arms, found), "All, by learning rate (–: not tried):": _all(arms, found)}


def _searches(section: Section) -> dict[str, Grid]:
    """Return a row for each arm's search: the best rates, and the axes on which no trial lies beyond them."""
    arms = {each.arm.name: each.trials for each in section.searches}
    chosen = {name: min(jobs, key=best.loss, default=None) for name, jobs in arms.items()}
    rows: list[list[str | Cell]] = []
    for each, job in zip(section.searches, section.jobs, strict=True):
        tokens = sum(run.summary()["tokens"] for trial in each.trials for run in trial.runs.values())
        state = " so far" if each.pending else ", cut off" if each.found.is_cut_off else ""
        rates = [_rate(each.best, name) for name in RATES]
        found = chosen[each.arm.name]
        losses = [best.cell(found), _above_the_trial(job, found)] if found else [MISSING] * 2
        cost = f"{len(each.trials)} of {each.how.trials}{state}", f"{tokens / 1e6:.1f}"
        rows.append([each.arm.name, *rates, *losses, *cost, ", ".join(each.found.open_sides()) or "no"])
    rates = [SHORT[name] for name in RATES]
    head = ["arm", *rates, "loss", "seeds − trial", "trials", "million tokens", "at an edge"]
    return {"The search for the rates:": Grid(head, rows), "Its trials, by learning rate:": _all(arms, chosen)}


def _above_the_trial(job: Job, trial: Job) -> str | Cell:
    """Return how far the mean over a job's own seeds is above the trial that chose its rates."""
    if not (job.runs and trial.runs):
        return NONE
    above = statistics.mean(job.numbers("validation_loss")) - statistics.mean(trial.numbers("validation_loss"))
    return Cell(f"{above:+.4f}".replace("-", "−"), {"": above})


def _best(arms: Mapping[str, Sequence[Job]], found: Mapping[str, Job | None]) -> Grid:
    """Return a row for each arm: its best rates, and the lines on which they are the smallest or largest tried."""
    rows: list[list[str | Cell]] = []
    for arm, job in found.items():
        tried = [other for other in arms[arm] if other.runs or other.diverged]
        if job is None:
            rows.append([arm, *[MISSING] * (len(RATES) + 1), str(len(tried)), MISSING])
        else:
            edges = ", ".join(title for title in LINES if _is_at_edge(job, tried, title))
            rows.append([arm, *(_rate(job, name) for name in RATES), best.cell(job), str(len(tried)), edges or "no"])
    return Grid(["arm", *(SHORT[name] for name in RATES), "validation loss", "runs", "at an edge"], rows)


def _all(arms: Mapping[str, Sequence[Job]], chosen: Mapping[str, Job | None]) -> Grid:
    """Return a row for each arm and its scales, a column for each learning rate."""
    rates = sorted({_rate(job, LR) for jobs in arms.values() for job in jobs}, key=float)
    rows: dict[tuple[str, str, str], dict[str, Job]] = defaultdict(dict)
    for arm, jobs in arms.items():
        for job in sorted(jobs, key=lambda job: [-job.rates.get(name, 0) for name in (S, C)]):
            rows[arm, _rate(job, S), _rate(job, C)][_rate(job, LR)] = job
    lines = [[*row, *(best.cell(found.get(rate), chosen[row[0]]) for rate in rates)] for row, found in rows.items()]
    return Grid(["arm", SHORT[S], SHORT[C], *(f"lr {rate}" for rate in rates)], lines)


def _rate(job: Job, name: str) -> str:
    return f"{job.rates[name]:g}" if name in job.rates else NONE


def _is_at_edge(found: Job, tried: Sequence[Job], title: str) -> bool:
    """Return whether the best rate is the smallest or largest tried on a line; a single value has no edge."""
    name, constant = LINES[title]
    rates = [job.rates for job in tried if name in job.rates]
    line = [each[name] for each in rates if constant(each) == constant(found.rates)]
    return len({each[name] for each in rates}) > 1 and found.rates[name] in (min(line), max(line))


def _scores(section: Section) -> dict[str, Grid]:
    """Return the tables of fine-tuning runs: at the last epoch, and at the best."""
    return {f"{table.TITLES[when]}:": grid for when, grid in table.scores(section.runs).items()} if section.runs else {}


def _lengths(section: Section) -> dict[str, Grid]:
    """Return the table of the steps that each arm needs to the reference's loss."""
    return {"": lengths.grid(section.jobs, section.reference[0])}


def _spreads(section: Section) -> dict[str, Grid]:
    """Return the table of how far runs lie apart that differ in their seeds."""
    return {"": spreads.grid(section.jobs)}


KINDS = {
    "comparison": _comparison, "search": _search, "scores": _scores, "lengths": _lengths, "spreads": _spreads,
    "side_by_side": _side_by_side,
}  # fmt: skip
KINDS_WITH = {  # key of a section -> the kinds that have it
    "columns": ("comparison", "side_by_side"), "arms": ("comparison", "side_by_side"), "best_of": ("comparison",),
    "rates": ("comparison", "lengths"),
}  # fmt: skip
