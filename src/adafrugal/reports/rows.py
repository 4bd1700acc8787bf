"""What all tables share: which runs make a row, and how rows are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from adafrugal.tracking.record import Record


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the head first, as a Markdown table whose first column is words and whose others are numbers."""
    head, *others = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(record: Record, name: str) -> Any:
    """Task, data, model, arm or seed of a run."""
    return (record.environment() or {})["identity"]["labels"][name]


def rows_of(records: list[Record]) -> list[tuple[str, list[Record]]]:
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
