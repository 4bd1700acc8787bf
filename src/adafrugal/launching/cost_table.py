"""Lay out the costs of jobs as text: a list for one, a table with sums for a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from adafrugal.launching.costs import TOKENS_OF_A_DOCUMENT, Costs
from adafrugal.settings.schema import Settings

NONE = "–"
HEAD = ("job", "settings", "record", "tokens", "model FLOPs", "memory", "checkpoints", "hours")
COUNTED = (
    "tokens: with padding. model FLOPs: 2 for each multiply-add, the backward pass twice the forward, evaluations\n"
    "forward only, without what recompute repeats. memory: the peak of all tensors that `python -m adafrugal.memory`\n"
    "estimates. checkpoints: those that stay."
)


@dataclass(frozen=True)
class Row:
    """A job, and what it costs."""

    name: str  # the settings that other jobs do not have
    settings: Settings
    state: str
    directory: str
    costs: Costs


def of_one(row: Row, hours: Sequence[str]) -> str:
    """Return the costs of a single run; `hours` are lines on where its hours come from."""
    costs, trainer = row.costs, row.settings.trainer
    bound = "at most " if costs.is_bound else ""
    shape = f"{costs.steps:,} steps of {trainer.batch_size} × {trainer.sequence_length}" if costs.steps else ""
    peak = costs.estimate and costs.estimate.peak
    lines = [
        ("record", f"{row.directory}: {row.state}"),
        ("tokens", f"{bound}{costs.tokens:,} in {shape}" if costs.tokens else NONE),
        ("model FLOPs", _flops(costs.flops)),
        ("memory", f"{_size(peak.total)} at the peak, in the {peak.phase} phase" if peak else NONE),
        ("checkpoints", f"{_size(costs.checkpoints)} at most" if costs.checkpoints else NONE),
        ("text on disk", _text([row])),
        ("hours", _hours(costs.seconds)),
    ]
    listed = "\n".join(f"{name:<16} {value}" for name, value in lines)
    return "\n".join([listed, "", *_notes([row], hours)]) + "\n"


def of_sweep(rows: Sequence[Row], hours: Sequence[str]) -> str:
    """Return a line for each job, one of sums, and one of what is left if some jobs are done."""
    cells = [HEAD, *((str(number), row.name, row.state, *_figures([row])) for number, row in enumerate(rows, 1))]
    left = [row for row in rows if row.state != "done"]
    cells.append(("sum", _jobs(rows), f"{len(rows) - len(left)} done", *_figures(rows)))
    if left and len(left) < len(rows):
        cells.append(("left", _jobs(left), "", *_figures(left)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths[:3]), *map(str.rjust, row[3:], widths[3:])]) for row in cells]
    return "\n".join([*lines, "", f"text on disk: {_text(rows)}", *_notes(rows, hours)]) + "\n"


def _jobs(rows: Sequence[Row]) -> str:
    return f"{len(rows)} job{'' if len(rows) == 1 else 's'}"


def _figures(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the cells of some jobs together: sums, and the largest memory; those of one are its own."""
    costs = [row.costs for row in rows]
    bound = "≤ " if any(each.is_bound and each.tokens for each in costs) else ""
    return (
        _of_all(costs, lambda each: each.tokens, lambda tokens: f"{bound}{_count(sum(tokens))}"),
        _of_all(costs, lambda each: each.flops, lambda found: _flops(sum(found))),
        _of_all(costs, lambda each: each.estimate and each.estimate.peak.total, lambda sizes: _size(max(sizes))),
        _of_all(costs, lambda each: each.checkpoints, lambda sizes: _size(sum(sizes))),
        _of_all(costs, lambda each: each.seconds, lambda seconds: _hours(sum(seconds))),
    )


def _of_all(
    costs: Iterable[Costs], figure: Callable[[Costs], float | None], text: Callable[[Sequence[float]], str]
) -> str:
    """Return the text of a figure of some jobs; with a mark if some of them have none."""
    found = [figure(each) for each in costs]
    known = [value for value in found if value is not None]
    return f"{text(known)}{'' if len(known) == len(found) else ' + ?'}" if known else NONE


def _text(rows: Sequence[Row]) -> str:
    """Return what the jobs need on disk to read; jobs of one text share its tokens."""
    largest: dict[str, Row] = {}
    for row in rows:
        key = repr(replace(row.settings.data, seed=None))
        if key not in largest or (row.costs.tokens or 0) > (largest[key].costs.tokens or 0):
            largest[key] = row
    costs = [row.costs for row in largest.values()]
    parts = []
    if packed := [each.stored for each in costs if each.stored is not None and each.documents is None]:
        parts.append(f"about {_size(sum(packed))} of tokens, less of a text that is shorter")
    if whole := [each.stored for each in costs if each.stored is not None and each.documents is not None]:
        size, count = _size(sum(whole)), _count(sum(each.documents or 0 for each in costs))
        parts.append(f"about {size} of tokens if each of {count} documents has {TOKENS_OF_A_DOCUMENT}, as C4's")
    return "; ".join(parts) or NONE


def _notes(rows: Sequence[Row], hours: Sequence[str]) -> list[str]:
    """Return what the figures are, and why some are missing."""
    reasons = dict.fromkeys(reason for row in rows for reason in row.costs.unknown)
    return [COUNTED, *hours, *(f"{NONE} {reason}" for reason in reasons)]


def _count(number: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:,.2f}{unit}"
    return f"{number:,.0f}"


def _flops(number: float | None) -> str:
    return NONE if number is None else f"{number:.2e}".replace("e+", "e")


def _size(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.2f} MiB"


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    size, unit = next(each for each in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * each[0] or each[1] == "s")
    return f"{seconds / size:,.1f} {unit}"
