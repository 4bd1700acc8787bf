"""What all tables share: which runs make a row, and how rows are written."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from adafrugal.reports.grid import Change
from adafrugal.settings.identity import still_part
from adafrugal.tracking.record import Record

# the seed is averaged over; lines of metrics may be rarer; precision and data stand in the row as what they came to
NO_DIFFERENCE = ("seed", "trainer.log_every", "trainer.precision", "data.source")
STATE = "optimizer state, start → end"


def label(record: Record, name: str) -> Any:
    """Task, data, model, arm or seed of a run."""
    return (record.environment() or {})["identity"]["labels"][name]


def rows_of(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Runs of one arm and all but the seed the same, under a name that tells them from the other rows."""
    rows: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    settings: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        environment = record.environment() or {}
        identity = environment["identity"]
        found = {name: value for name, value in still_part(identity["differs"]).items() if name not in NO_DIFFERENCE}
        found |= {"precision": environment["precision"], "data": environment["data"]["fingerprint"][:8]}
        key = (identity["labels"]["arm"], *(f"{name}={found[name]}" for name in sorted(found)))
        rows[key].append(record)
        settings[key] = found
    named = []
    for key, runs in rows.items():
        rivals = [settings[other] for other in rows if other[0] == key[0]]
        apart = {name for rival in rivals for name in rival if any(r.get(name) != rival[name] for r in rivals)}
        own = {name: settings[key].get(name, _default(runs[0], name)) for name in sorted(apart)}
        named.append(
            (" ".join([key[0], *(f"{name}={value}" for name, value in own.items() if value is not None)]), runs)
        )
    return named


def _default(record: Record, name: str) -> Any:
    """A setting that stands at its default, and so is not among those by which the run is known."""
    value: Any = record.config()
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def state(summaries: Sequence[Mapping[str, Any]]) -> Change:
    """Optimizer state at the start of runs and at their end."""
    start, end = (statistics.mean(s["state_bytes"][when] / 2**20 for s in summaries) for when in ("start", "end"))
    return Change(start, end, "MiB")
