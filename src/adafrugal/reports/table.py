"""Runs side by side: one Markdown table for each task, data and model, one row for each arm.

Fine-tuning runs of one model share a table over all data sets.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from adafrugal.reports import scores
from adafrugal.reports.rows import label, rows_of, table
from adafrugal.reports.summary import mib
from adafrugal.tracking.record import Record

COLUMNS = {
    "validation loss": lambda s: (s["validation_loss"], "{:.4f}"),
    "perplexity": lambda s: (s["validation_perplexity"], "{:.1f}"),
    "bits per byte": lambda s: (s["validation_bits_per_byte"], "{:.3f}"),
    "optimizer ÷ forward and backward": lambda s: (100 * s["optimizer_share"], "{:.1f}%"),
}


def find(places: Iterable[Path]) -> list[Record]:
    """The runs at or below some directories, in the order of their names."""
    files = sorted({file for place in places for file in place.rglob("status.json")})
    return [Record(file.parent) for file in files]


def markdown(records: list[Record]) -> str:
    """Tables of the finished runs; what is not finished is named below them.

    Runs that differ in their seed alone share a row: mean ± standard deviation, and their number.
    """
    finished = [record for record in records if record.status == "finished"]
    unfinished = [record for record in records if record.status != "finished"]
    settings: dict[str, list[Record]] = defaultdict(list)
    finetuned: dict[str, list[Record]] = defaultdict(list)
    for record in finished:
        if label(record, "task") == "finetune":
            finetuned[label(record, "model")].append(record)
        else:
            settings[" ".join(label(record, key) for key in ("task", "data", "model"))].append(record)
    parts = [f"## {name}\n\n{_table(runs)}" for name, runs in settings.items()]
    for model, runs in finetuned.items():
        parts.append(f"## finetune {model}\n\n{scores.markdown(runs)}")
    if unfinished:
        parts.append("\n".join(f"- not finished ({record.status}): {record.directory}" for record in unfinished))
    return "\n\n".join(parts) + "\n"


def _table(records: list[Record]) -> str:
    head = ["arm", "n", "steps", *COLUMNS, "optimizer state, start → end"]
    rows = [head]
    for name, runs in rows_of(records):
        summaries = [run.summary() for run in runs]
        cells = [_cell([read(s) for s in summaries]) for read in COLUMNS.values()]
        start, end = (statistics.mean(s["state_bytes"][when] for s in summaries) for when in ("start", "end"))
        memory = f"{mib(start)} → {mib(end)}"
        rows.append([name, str(len(runs)), f"{summaries[0]['steps']:,}", *cells, memory])
    return table(rows)


def _cell(values: list[tuple[float, str]]) -> str:
    numbers, form = [number for number, _ in values], values[0][1]
    mean = form.format(statistics.mean(numbers))
    return mean if len(numbers) == 1 else f"{mean} ± {form.format(statistics.stdev(numbers))}"
