"""Whether the checkpoint of another run that a run names is one that it may go on from. Needs no torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from adafrugal.settings import checkpoint_names
from adafrugal.settings.compose import recorded
from adafrugal.settings.identity import Identity, beside, differing
from adafrugal.settings.past import CONTROLS, another_past, filled
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

_FOLLOWING = (  # null for what the length of the run makes of them
    "schedule.warmup", "schedule.cycle", "schedule.cooldown",
    *(f"optimizer.{name}.{key}" for name in CONTROLS for key in ("steps", "every")),
)  # fmt: skip


def refuse_another_past(settings: Settings) -> None:
    """Raise a SettingError if `trainer.continue_from` names no checkpoint, or one with another past than this run's."""
    place = Path(settings.trainer.continue_from)
    run, given = place.parents[1], f"trainer.continue_from is {place}"
    if not place.is_dir():
        there = ", ".join(path.name for path in sorted(place.parent.glob("step-*"))) or "none there"
        raise SettingError(f"{given}, which does not exist; allowed: a checkpoint of {run} ({there})")
    key = checkpoint_names.recorded(run).get("identity", {}).get("key")
    if key != run.name:
        what = f"is of the run {key}" if key else "is not there or has no identity"
        raise SettingError(f"{given}, whose environment.json {what}; allowed: a run's directory under its own name")
    try:
        theirs = recorded(Record(run).config())
    except SettingError as error:
        raise SettingError(f"{given}: {error}") from error
    if (why := another_past(settings, theirs, checkpoint_names.step(str(place)))) is not None:
        raise SettingError(f"{why}; {given}")


def shorter(settings: Settings, identity: Identity) -> str | None:
    """Return a line about the longest finished run that differs from a new one in its length alone, and is shorter."""
    done: dict[int, tuple[Record, Settings]] = {}
    for directory, _ in beside(identity, differing(settings), "trainer.steps", *_FOLLOWING):
        run = Record(directory)
        with suppress(SettingError):  # an older version's, of which nothing is known
            if run.status == "finished" and _is_alike(settings, theirs := recorded(run.config())):
                done[theirs.trainer.steps] = run, theirs
    steps = max((steps for steps in done if steps < settings.trainer.steps), default=None)
    if steps is None:
        return None
    run, theirs = done[steps]
    why = another_past(settings, theirs, steps)
    if why is None and not any(run.directory.glob("checkpoints/step-*")):
        why = "its checkpoints are gone"
    how = f"to go on from it: trainer.continue_from={run.directory}" if why is None else f"it cannot go on: {why}"
    return f"{run.directory.name} is this run with trainer.steps={steps}, and finished; this one begins anew; {how}"


def _is_alike(ours: Settings, theirs: Settings) -> bool:
    """Return whether settings that follow the length of a run unless they are set are so in both, or are the same."""
    mine, other = differing(ours), differing(theirs)
    return all(mine.get(name) == other.get(name) or _steps(ours, name) == _steps(theirs, name) for name in _FOLLOWING)


def _steps(settings: Settings, name: str) -> Any:
    """Return a setting of `_FOLLOWING` with the length of the run in the place of null."""
    group, _, key = name.rpartition(".")
    if group == "schedule":
        schedule = settings.schedule
        return getattr(schedule, f"{key}_steps", int)(schedule.period(settings))  # a cycle is a period
    return (filled(settings, group.rpartition(".")[2]) or {}).get(key)
