"""Tables of runs side by side, for each task, data and model, with a row for each arm and its settings.

Pre-training runs have one line of measures. Fine-tuning runs of one model share a table over all data sets.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adafrugal.reports.cells import COLUMNS, UNKNOWN, USUAL, compared, state
from adafrugal.reports.grid import MISSING, Cell, Grid, number
from adafrugal.reports.statistics import Sample
from adafrugal.settings.identity import still_part
from adafrugal.settings.naming import shown
from adafrugal.tracking.record import Record, spoken

MEMORY = "peak memory, estimate / measured"
# log_every does not affect results; precision and data are shown resolved
NO_DIFFERENCE = ("seed", "trainer.log_every", "trainer.precision", "data.source")
ABSENT = object()  # a setting that a run does not have
REFERENCE = "adamw"  # the arm to compare scores with
TITLES = {"last": "At the last epoch", "best": "At the best epoch by each data set's first metric"}
Row = Mapping[str, Sequence[Record]]  # data set -> the runs of one arm


def markdown(records: Sequence[Record]) -> str:
    """Return tables of finished runs, with the seeds of one setting in one row, and a list of the other runs."""
    pretrained: dict[str, list[Record]] = defaultdict(list)
    finetuned: dict[str, list[Record]] = defaultdict(list)
    unfinished = []
    for record in records:
        if record.status != "finished":
            unfinished.append(f"- not finished ({record.status}): {record.directory}")
        elif _label(record, "task") == "finetune":
            finetuned[_label(record, "model")].append(record)
        else:
            pretrained[" ".join(_label(record, key) for key in ("task", "data", "model"))].append(record)
    parts = [f"## {name}\n\n{_language(runs).markdown()}" for name, runs in pretrained.items()]
    for model, runs in finetuned.items():
        tables = (f"{TITLES[when]}:\n\n{grid.markdown()}" for when, grid in scores(runs).items())
        parts.append("\n\n".join([f"## finetune {model}", *tables]))
    return "\n\n".join([*parts, *(["\n".join(unfinished)] if unfinished else [])]) + "\n"


def _label(record: Record, name: str) -> Any:
    return record.environment()["identity"]["labels"][name]


def _rows(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Group runs that differ only in their seed, named by the arm and the settings that differ from its other rows.

    A null says nothing, and is left out of a name that no other row has without it.
    """
    rows: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    settings: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        environment = record.environment()
        differs = still_part(environment["identity"]["differs"])
        found = {name: value for name, value in differs.items() if name not in NO_DIFFERENCE}
        found |= {"precision": environment["precision"], "data": environment["data"]["fingerprint"][:8]}
        key = (_label(record, "arm"), *(f"{name}={found[name]}" for name in sorted(found)))
        rows[key].append(record)
        settings[key] = found
    named = []
    for key, runs in rows.items():
        rivals = [settings[other] for other in rows if other[0] == key[0]]
        apart = {name for rival in rivals for name in rival if any(r.get(name) != rival[name] for r in rivals)}
        own = {name: settings[key][name] for name in sorted(apart & settings[key].keys())}
        defaults = OmegaConf.create(runs[0].config())
        own |= {name: OmegaConf.select(defaults, name, default=ABSENT) for name in sorted(apart - own.keys())}
        has = {name: own[name] for name in sorted(own) if own[name] is not ABSENT}
        named.append((key[0], has, runs))
    brief = [_name(arm, {name: value for name, value in has.items() if value is not None}) for arm, has, _ in named]
    return [
        (name if brief.count(name) == 1 else _name(arm, has), runs)
        for name, (arm, has, runs) in zip(brief, named, strict=True)
    ]


def _name(arm: str, settings: Mapping[str, Any]) -> str:
    return f"{arm} {shown(settings)}".strip()


# -- pre-training ------------------------------------------------------------------------------------------------------


def _language(records: Sequence[Record]) -> Grid:
    has_memory = all("estimate" in record.summary().get("memory", {}) for record in records)
    rows: list[list[str | Cell]] = []
    for name, runs in sorted(_rows(records), key=_place):
        found = [run.summary() for run in runs]
        measured = (COLUMNS[column].cell(found) for column in USUAL)
        rows.append([name, str(len(runs)), f"{found[0]['steps']:,}", *measured])
        if has_memory:
            rows[-1].append(_memory(found))
    titles = (COLUMNS[column].title for column in USUAL)
    return Grid(["arm", "n", "steps", *titles, *([MEMORY] if has_memory else [])], rows)


def _memory(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return estimated and measured peak, and the relative error; for compiled runs the estimate is an upper bound."""
    estimate = statistics.mean(s["memory"]["estimate"] for s in summaries)
    measured = [s["memory"]["grown"] for s in summaries if "grown" in s["memory"]]
    bound = "≤ " if any(s["memory"].get("is_upper_bound") for s in summaries) else ""
    if not measured:
        return f"{bound}{estimate / 2**20:,.0f} MiB / {UNKNOWN}"
    grown = statistics.mean(measured)
    return f"{bound}{estimate / 2**20:,.0f} / {grown / 2**20:,.0f} MiB ({estimate / grown - 1:+.1%})"


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def scores(records: Sequence[Record]) -> dict[str, Grid]:
    """Return the tables of finished fine-tuning runs of one model: at the last epoch, and at the best.

    A cell is the mean ± standard deviation over seeds, in points. The mean over data sets takes each one's
    first metric, seed by seed; its difference to AdamW's is paired by seed, with its 95% interval.
    """
    by_set: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_set[_data(record)].append(record)
    sets = sorted(by_set)
    rows: dict[str, dict[str, Sequence[Record]]] = defaultdict(dict)
    for name in sets:
        for arm, runs in _rows(by_set[name]):
            rows[arm][name] = runs
    columns = [
        (name, metric)
        for name in sets
        for metric in dict.fromkeys(metric for run in by_set[name] for metric in run.summary()["metrics"])
    ]
    return {when: _scores(rows, sets, columns, when) for when in TITLES}


def _data(record: Record) -> str:
    """Return the name of a data set: its settings file, or the last part of `data.source` for custom data."""
    name = _label(record, "data")
    return Path(record.config()["data"]["source"]).name if name == "labelled" else name


def _scores(rows: Mapping[str, Row], sets: Sequence[str], columns: Sequence[tuple[str, str]], when: str) -> Grid:
    has_mean = len(sets) > 1
    head = ["arm", "n", *(["mean", f"− {REFERENCE}"] if has_mean else [])]
    head += [*(f"{name} {spoken(metric)}" for name, metric in columns), COLUMNS["state"].title]
    means = {arm: _means(row, sets, when) for arm, row in rows.items()}
    lines = []
    for arm, row in sorted(rows.items(), key=_place):
        counts = sorted({len(row.get(name, ())) for name in sets})
        cells: list[str | Cell] = [arm, "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))]
        if has_mean:
            cells += [_points(means[arm].values()), compared(means, arm, REFERENCE, ".2f")]
        for name, metric in columns:
            found = (run.summary()[when].get(metric) for run in row.get(name, ()))
            cells.append(_points(100 * value for value in found if value is not None))
        lines.append([*cells, state([run.summary() for runs in row.values() for run in runs])])
    return Grid(head, lines)


def _points(values: Iterable[float]) -> str | Cell:
    found = list(values)
    return number(Sample.of(found), ".2f") if found else MISSING


def _place(item: tuple[str, object]) -> tuple[bool, str, list[tuple[str, float, str]]]:
    """Return a sort key for rows: the reference first, then by arm, then by settings as numbers."""
    arm, *settings = item[0].split()
    values = []
    for name, _, value in (setting.partition("=") for setting in settings):
        number = math.inf
        with suppress(ValueError):
            number = float(value)
        values.append((name, number, value))
    return arm != REFERENCE, arm, values


def _means(row: Row, sets: Sequence[str], when: str) -> dict[int, float]:
    """Return seed -> mean over data sets, in points, for each seed that has all data sets."""
    by_seed: dict[int, dict[str, float]] = defaultdict(dict)
    for name in sets:
        for run in row.get(name, ()):
            summary = run.summary()
            by_seed[_label(run, "seed")][name] = 100 * summary[when][summary["metric"]]
    return {seed: statistics.mean(found.values()) for seed, found in by_seed.items() if len(found) == len(sets)}
