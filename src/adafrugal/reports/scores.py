"""Fine-tuning runs side by side: one row an arm, one column a data set's metric, and the mean over data sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adafrugal.reports.rows import label, rows_of, table
from adafrugal.reports.summary import mib
from adafrugal.tracking.record import Record, spoken

MISSING = "missing"  # never a blank, which reads like nothing, or like zero
REFERENCE = "adamw"  # the arm that the others are compared with
OWN = "labelled"  # the settings' file for data sets of one's own
STATE = "optimizer state, start → end"
Row = Mapping[str, Sequence[Record]]  # data set -> the runs of one arm


@dataclass(frozen=True)
class Value:
    """A mean over seeds.

    Args:
        mean: in points, that is hundredths.
        spread: the standard deviation; None of a single seed.
        n: seeds.
    """

    mean: float
    spread: float | None
    n: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Value:
        """The value of some numbers between −1 and 1."""
        points = [100 * number for number in numbers]
        return cls(statistics.mean(points), statistics.stdev(points) if len(points) > 1 else None, len(points))

    def minus(self, other: Value) -> Value:
        """The difference of two means, and the standard error of it."""
        errors = [None if v.spread is None else v.spread**2 / v.n for v in (self, other)]
        error = None if None in errors else math.sqrt(sum(e for e in errors if e is not None))
        return Value(self.mean - other.mean, error, min(self.n, other.n))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.spread is None else f" ± {self.spread:.2f}")


def markdown(records: Sequence[Record]) -> str:
    """The tables of finished runs of one model: at the last epoch, and at the best.

    Runs of one arm that differ in their seed alone share a cell, mean ± standard deviation in points. The mean over
    data sets is of each one's first metric, seed by seed; its spread is over seeds. The difference is to AdamW's mean,
    with its standard error.
    """
    sets = sorted({_data(record) for record in records})
    rows: dict[str, dict[str, Sequence[Record]]] = {}
    for name in sets:
        for arm, runs in rows_of([record for record in records if _data(record) == name]):
            rows.setdefault(arm, {})[name] = runs
    columns = [(name, metric) for name in sets for metric in _metrics(records, name)]
    last = _table(rows, sets, columns, "last")
    best = _table(rows, sets, columns, "best")
    return f"At the last epoch:\n\n{last}\n\nAt the best epoch by each data set's first metric:\n\n{best}"


def _table(rows: Mapping[str, Row], sets: Sequence[str], columns: Sequence[tuple[str, str]], when: str) -> str:
    has_mean, reference = len(sets) > 1, _mean(rows.get(REFERENCE, {}), sets, when)
    means = ["mean", f"− {REFERENCE}"] if has_mean else []
    lines = [["arm", "n", *means, *(f"{name} {spoken(metric)}" for name, metric in columns), STATE]]
    for arm, row in sorted(rows.items(), key=_place):
        cells = [arm, _counts(row, sets)]
        if has_mean:
            mean = _mean(row, sets, when)
            difference = str(mean.minus(reference)) if mean and reference else MISSING
            cells += [str(mean or MISSING), "" if arm == REFERENCE else difference]
        for name, metric in columns:
            found = [run.summary()[when][metric] for run in row.get(name, ()) if metric in run.summary()[when]]
            cells.append(str(Value.of(found)) if found else MISSING)
        lines.append([*cells, _state(row)])
    return table(lines)


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


def _mean(row: Row, sets: Sequence[str], when: str) -> Value | None:
    """Over data sets, for each seed that has all of them; None where there is no such seed."""
    by_seed: dict[int, dict[str, float]] = {}
    for name in sets:
        for run in row.get(name, ()):
            summary = run.summary()
            by_seed.setdefault(label(run, "seed"), {})[name] = summary[when][summary["metric"]]
    means = [statistics.mean(found.values()) for found in by_seed.values() if len(found) == len(sets)]
    return Value.of(means) if means else None


def _counts(row: Row, sets: Sequence[str]) -> str:
    counts = {len(row.get(name, ())) for name in sets}
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"


def _state(row: Row) -> str:
    states = [run.summary()["state_bytes"] for runs in row.values() for run in runs]
    start, end = (statistics.mean(state[when] for state in states) for when in ("start", "end"))
    return f"{mib(start)} → {mib(end)}"


def _metrics(records: Sequence[Record], data: str) -> list[str]:
    named = [metric for record in records if _data(record) == data for metric in record.summary()["metrics"]]
    return list(dict.fromkeys(named))


def _data(record: Record) -> str:
    """What the column is called: the settings' file, or the last part of the source where that is anybody's own."""
    name = label(record, "data")
    return Path(record.config()["data"]["source"]).name if name == OWN else name
