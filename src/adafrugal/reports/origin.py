"""Say which code made a table's runs, on which machine, with which torch, in which precision and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adafrugal.tracking.record import Record

if TYPE_CHECKING:
    from adafrugal.reports.plan import Section

UNKNOWN = "not recorded"


def line(section: Section) -> str:
    """Return the line below a table: each fact once where all runs agree, else with its number of runs.

    Facts that no run recorded are left out; runs that lack one that others have are counted.
    """
    trials = [run for each in section.searches for job in each.trials for run in job.runs.values()]
    runs = {run.directory: run for run in [*section.runs, *trials]}
    environments = [run.environment() or {} for run in runs.values()]
    facts = [f"{what}{said}" for what, read in _FACTS if (said := _counted([read(found) for found in environments]))]
    days = sorted(day for run in runs.values() if (day := _day(run)))
    facts += [days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"] if days else []
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {'; '.join(facts)}." if facts else ""


def _counted(found: Sequence[str | None]) -> str:
    counts = Counter(each or UNKNOWN for each in found)
    if not any(found):
        return ""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())


def _code(environment: Mapping[str, Any]) -> str | None:
    code = environment.get("code") or {}
    changed = " with changes" if code.get("changed") else ""
    return f"{code['commit'][:7]}{changed}" if code.get("commit") else None


def _machine(environment: Mapping[str, Any]) -> str | None:
    device = environment.get("device")
    if device != "cpu":
        return device
    cores = environment.get("cores")
    return f"{environment.get('processor') or 'CPU'}{f', {cores} cores' if cores else ''}"


_FACTS: tuple[tuple[str, Callable[[Mapping[str, Any]], str | None]], ...] = (
    ("code ", _code),
    ("", _machine),
    ("torch ", lambda environment: (environment.get("packages") or {}).get("torch")),
    ("", lambda environment: environment.get("precision")),
)


def _day(run: Record) -> str | None:
    begun = run.begun
    return begun[:10] if begun else None
