"""Fine-tuning runs side by side: one row an arm, one column a data set's metric, and the mean over data sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from adafrugal.reports.grid import MISSING, Cell, Difference, Grid, Number
from adafrugal.reports.selection import STATE, label, rows_of, state
from adafrugal.reports.statistics import Sample, contrast
from adafrugal.tracking.record import Record, spoken

REFERENCE = "adamw"  # the arm that the others are compared with
OWN = "labelled"  # the settings' file for data sets of one's own
TITLES = {"last": "At the last epoch", "best": "At the best epoch by each data set's first metric"}
Row = Mapping[str, Sequence[Record]]  # data set -> the runs of one arm


def markdown(records: Sequence[Record]) -> str:
    """The tables of finished runs of one model, as Markdown."""
    return "\n\n".join(f"{TITLES[when]}:\n\n{grid.markdown()}" for when, grid in grids(records).items())


def grids(records: Sequence[Record]) -> dict[str, Grid]:
    """The tables of finished runs of one model: at the last epoch, and at the best.

    Runs of one arm that differ in their seed alone share a cell, mean ± standard deviation in points. The mean over
    data sets is of each one's first metric, seed by seed; its spread is over seeds. The difference to AdamW's mean is
    paired by seed, with its 95% interval.
    """
    sets = sorted({_data(record) for record in records})
    rows: dict[str, dict[str, Sequence[Record]]] = {}
    for name in sets:
        for arm, runs in rows_of([record for record in records if _data(record) == name]):
            rows.setdefault(arm, {})[name] = runs
    columns = [(name, metric) for name in sets for metric in _metrics(records, name)]
    return {when: _grid(rows, sets, columns, when) for when in TITLES}


def _grid(rows: Mapping[str, Row], sets: Sequence[str], columns: Sequence[tuple[str, str]], when: str) -> Grid:
    has_mean = len(sets) > 1
    head = ["arm", "n", *(["mean", f"− {REFERENCE}"] if has_mean else [])]
    head += [*(f"{name} {spoken(metric)}" for name, metric in columns), STATE]
    means = {arm: _means(row, sets, when) for arm, row in rows.items()}
    lines = []
    for arm, row in sorted(rows.items(), key=_place):
        cells: list[Cell] = [arm, _counts(row, sets)]
        if has_mean:
            difference = contrast(means, {arm: 1, REFERENCE: -1})
            cells.append(Number(Sample.of(means[arm].values()), ".2f") if means[arm] else MISSING)
            cells.append("–" if arm == REFERENCE else Difference(difference, ".2f") if difference else MISSING)
        for name, metric in columns:
            found = [run.summary()[when][metric] for run in row.get(name, ()) if metric in run.summary()[when]]
            cells.append(Number(Sample.of(100 * value for value in found), ".2f") if found else MISSING)
        lines.append([*cells, state([run.summary() for runs in row.values() for run in runs])])
    return Grid(head, lines)


def _place(item: tuple[str, Row]) -> tuple[bool, str, list[tuple[float, str]]]:
    """The reference first, then by arm, and within an arm by its settings as numbers."""
    arm, *settings = item[0].split()
    values = [setting.partition("=")[2] for setting in settings]
    return arm != REFERENCE, arm, [(_number(value), value) for value in values]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _means(row: Row, sets: Sequence[str], when: str) -> dict[int, float]:
    """Seed -> the mean over data sets, in points, for each seed that has all of them."""
    by_seed: dict[int, dict[str, float]] = {}
    for name in sets:
        for run in row.get(name, ()):
            summary = run.summary()
            by_seed.setdefault(label(run, "seed"), {})[name] = 100 * summary[when][summary["metric"]]
    return {seed: statistics.mean(found.values()) for seed, found in by_seed.items() if len(found) == len(sets)}


def _counts(row: Row, sets: Sequence[str]) -> str:
    counts = {len(row.get(name, ())) for name in sets}
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"


def _metrics(records: Sequence[Record], data: str) -> list[str]:
    named = [metric for record in records if _data(record) == data for metric in record.summary()["metrics"]]
    return list(dict.fromkeys(named))


def _data(record: Record) -> str:
    """What the column is called: the settings' file, or the last part of the source where that is anybody's own."""
    name = label(record, "data")
    return Path(record.config()["data"]["source"]).name if name == OWN else name
