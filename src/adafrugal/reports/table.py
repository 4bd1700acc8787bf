"""Runs side by side: one Markdown table for each task, data and model, one row for each arm.

Fine-tuning runs of one model share a table over all data sets.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from adafrugal.reports import scores
from adafrugal.reports.grid import Cell, Grid, Number
from adafrugal.reports.selection import STATE, label, rows_of, state
from adafrugal.reports.statistics import Sample
from adafrugal.tracking.record import Record

COLUMNS = {  # of the summary: key, form, factor
    "validation loss": ("validation_loss", ".4f", 1),
    "perplexity": ("validation_perplexity", ".1f", 1),
    "bits per byte": ("validation_bits_per_byte", ".3f", 1),
    "optimizer ÷ forward and backward": ("optimizer_share", ".1f", 100),
}


MEMORY = "peak memory, estimate / measured"


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
    rows = []
    foretold = [MEMORY] if all("estimate" in record.summary().get("memory", {}) for record in records) else []
    for name, runs in rows_of(records):
        summaries = [run.summary() for run in runs]
        memory = [_beside(summaries)] if foretold else []
        rows.append(
            [name, str(len(runs)), f"{summaries[0]['steps']:,}", *measured(summaries), state(summaries), *memory]
        )
    return Grid(["arm", "n", "steps", *COLUMNS, STATE, *foretold], rows).markdown()


def _beside(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The estimate of the peak, what was measured, and the relative error; of compiled runs it is an upper bound."""
    estimate, grown = (statistics.mean(s["memory"][key] for s in summaries) for key in ("estimate", "grown"))
    bound = "≤ " if any(s["memory"].get("is_upper_bound") for s in summaries) else ""
    return f"{bound}{estimate / 2**20:,.0f} / {grown / 2**20:,.0f} MiB ({estimate / grown - 1:+.1%})"


def measured(summaries: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells of `COLUMNS`, means over the summaries of some runs."""
    return [
        Number(Sample.of(factor * summary[key] for summary in summaries), form, "%" if factor == 100 else "")
        for key, form, factor in COLUMNS.values()
    ]
