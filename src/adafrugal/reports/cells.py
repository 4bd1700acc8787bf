"""The columns of a table of pre-training runs, and their cells: means over the runs of a row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from adafrugal.reports.grid import MISSING, NONE, Cell, change, difference, number
from adafrugal.reports.statistics import Sample, contrast

MIB = 2**20
BESIDE = ("evaluation", "checkpoint", "compile")  # phases that are no training
PHASES = ("data", "forward", "backward", "optimizer", "refresh", "evaluation", "checkpoint")  # of a run's seconds
UNKNOWN = "not measured"
Summaries: TypeAlias = Sequence[Mapping[str, Any]]  # of the runs of a row


@dataclass(frozen=True)
class Column:
    """A column: its title, and how its cell is made of the summaries of a row's runs."""

    title: str
    cell: Callable[[Summaries], str | Cell]


def _mean(title: str, form: str, read: Callable[[Mapping[str, Any]], float], unit: str = "") -> Column:
    return Column(title, lambda found: number(Sample.of(map(read, found)), form, unit))


def state(summaries: Summaries) -> Cell:
    """Return the cell of the optimizer's state: means over the summaries of some runs."""
    start, end = (statistics.mean(s["state_bytes"][when] / MIB for s in summaries) for when in ("start", "end"))
    return change(start, end, "MiB")


def peak(memory: Mapping[str, Any]) -> int | None:
    """Return the bytes that a run took at its peak, from its summary's `memory`; None if they were not measured.

    A GPU's are those of tensors. A CPU's are what the process grew by, which says nothing of one run where several
    shared the process; records that do not say whether it was alone have none.
    """
    if "allocated" in memory:
        return memory.get("grown", memory["peak_of_the_run"])
    return memory.get("grown") if memory.get("alone") else None


def _memory(summaries: Summaries) -> str | Cell:
    found = [size / MIB for s in summaries if (size := peak(s.get("memory", {}))) is not None]
    return number(Sample.of(found), ",.0f") if found else UNKNOWN


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Return a run's seconds without evaluations, of which arms make different numbers, checkpoints and compiling."""
    return seconds["wall"] - sum(seconds.get(phase, 0.0) for phase in BESIDE)


COLUMNS = {  # name in a page's `columns` -> column
    "loss": _mean("validation loss", ".4f", lambda s: s["validation_loss"]),
    "perplexity": _mean("perplexity", ".1f", lambda s: s["validation_perplexity"]),
    "bits_per_byte": _mean("bits per byte", ".3f", lambda s: s["validation_bits_per_byte"]),
    "optimizer_share": _mean("optimizer ÷ forward and backward", ".1f", lambda s: 100 * s["optimizer_share"], "%"),
    "state": Column("optimizer state, start → end", state),
    "memory": Column("peak memory (MiB)", _memory),
    "training_seconds": _mean("seconds without evaluations", ",.1f", lambda s: training_seconds(s["seconds"])),
    "seconds": _mean("seconds with evaluations", ",.1f", lambda s: s["seconds"]["wall"]),
    "tokens": Column("tokens", lambda found: f"{round(statistics.mean(s['tokens'] for s in found)):,}"),
} | {
    f"{phase}_seconds": _mean(f"seconds: {phase}", ",.1f", lambda s, phase=phase: s["seconds"].get(phase, 0.0))
    for phase in PHASES
}  # fmt: skip
USUAL = ("loss", "perplexity", "bits_per_byte", "optimizer_share", "state")


def compared(numbers: Mapping[str, Mapping[int, float]], arm: str, reference: str, form: str) -> str | Cell:
    """Return the cell of an arm's difference to the reference, paired by seed (arm -> seed -> number)."""
    found = contrast(numbers, {arm: 1, reference: -1}) if arm != reference else None
    return NONE if arm == reference else difference(found, form) if found else MISSING
