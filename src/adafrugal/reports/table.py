"""Runs side by side: one Markdown table for each task, data and model, one row for each arm."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    for record in finished:
        labels = record.environment()["identity"]["labels"]
        settings[" ".join(labels[key] for key in ("task", "data", "model"))].append(record)
    parts = [f"## {name}\n\n{_table(runs)}" for name, runs in settings.items()]
    if unfinished:
        parts.append("\n".join(f"- not finished ({record.status}): {record.directory}" for record in unfinished))
    return "\n\n".join(parts) + "\n"


def _table(records: list[Record]) -> str:
    head = ["arm", "n", "steps", *COLUMNS, "optimizer state, start → end"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, runs in _rows(records):
        summaries = [run.summary() for run in runs]
        cells = [_cell([read(s) for s in summaries]) for read in COLUMNS.values()]
        start, end = (statistics.mean(s["state_bytes"][when] for s in summaries) for when in ("start", "end"))
        memory = f"{mib(start)} → {mib(end)}"
        rows.append([name, str(len(runs)), f"{summaries[0]['steps']:,}", *cells, memory])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows(records: list[Record]) -> list[tuple[str, list[Record]]]:
    """Runs of one arm and all but the seed the same, under a name that tells them from the other rows."""
    rows: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    differs: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        environment = record.environment()
        identity = environment["identity"]
        settings = {name: value for name, value in identity["differs"].items() if name != "seed"}
        settings |= {"precision": environment["precision"], "data": environment["data"]["fingerprint"][:8]}
        key = (identity["labels"]["arm"], *(f"{name}={settings[name]}" for name in sorted(settings)))
        rows[key].append(record)
        differs[key] = settings
    named = []
    for key, runs in rows.items():
        rivals = [set(other[1:]) for other in rows if other[0] == key[0]]
        own = [setting for setting in key[1:] if any(setting not in rival for rival in rivals)]
        named.append((" ".join([key[0], *own]), runs))
    return named


def _cell(values: list[tuple[float, str]]) -> str:
    numbers, form = [number for number, _ in values], values[0][1]
    mean = form.format(statistics.mean(numbers))
    return mean if len(numbers) == 1 else f"{mean} ± {form.format(statistics.stdev(numbers))}"
