"""Whether a run may go on from another run's checkpoint. Needs no torch.

The rule: the continued run must have the past that this run would have had. Every setting on which the steps up to the
branch depend is the same; the schedule and the controls may differ where their numbers at these steps do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

from adafrugal.models.schedule import factor
from adafrugal.optim import controls
from adafrugal.optim.controls import Control
from adafrugal.settings import checkpoint_names
from adafrugal.settings.canonical import density_of_rank, with_run_length
from adafrugal.settings.compose import recorded
from adafrugal.settings.identity import CONTINUE_FROM, Identity, beside, differing
from adafrugal.settings.schedule_settings import WsdSchedule
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

_LATER = ("trainer.steps", CONTINUE_FROM, "trainer.log_every", "schedule.", "eval.")  # compared by numbers, or not
_CONTROLS = ("density", "rank", "interval")
_FOLLOWING = (  # null for what the length of the run makes of them
    "schedule.warmup", "schedule.cycle", "schedule.cooldown",
    *(f"optimizer.{name}.{key}" for name in _CONTROLS for key in ("steps", "every")),
)  # fmt: skip
_COLUMNS = 1 << 20  # above any model's hidden size, so that a rank is a density


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


def another_past(ours: Settings, theirs: Settings, step: int) -> str | None:
    """Return why a run cannot go on from another's checkpoint of a step, and what to set; None if it can."""
    if ours.trainer.steps <= step:
        return f"trainer.steps is {ours.trainer.steps}; allowed: above {step}, the step of the checkpoint"
    return _other_setting(ours, theirs) or _other_rate(ours, theirs, step) or _other_control(ours, theirs, step)


def _other_setting(ours: Settings, theirs: Settings) -> str | None:
    mine, other = differing(ours), differing(theirs)
    is_frugal = ours.optimizer.kind == theirs.optimizer.kind == "frugal"
    later = (*_LATER, *(f"optimizer.{name}" for name in _CONTROLS)) if is_frugal else _LATER
    for name in dict.fromkeys([*mine, *other]):
        if not name.startswith(later) and mine.get(name, ...) != other.get(name, ...):
            had = _value(theirs, name)
            return f"{name} is {_value(ours, name)}, and the continued run had {had}; allowed: {had}"
    return None


def _value(settings: Settings, name: str) -> str:
    """Return a setting in words; a setting of another kind of part is null."""
    value = reduce(lambda part, key: getattr(part, key, None), name.split("."), settings)
    return "null" if value is None else str(value)


def _other_rate(ours: Settings, theirs: Settings, step: int) -> str | None:
    """Compare the learning rate's factors at the steps before the branch."""
    mine, other = (factor(s.schedule, s.trainer.steps) for s in (ours, theirs))
    warmups = [s.schedule.warmup_steps(s.schedule.period(s)) for s in (ours, theirs)]
    differs = [done for done in range(step) if mine(done) != other(done)]
    if not differs:
        return None
    done = next((done for done in differs if done >= max(warmups)), differs[0])
    steps, schedule = ours.trainer.steps, ours.schedule
    given = f"schedule is {schedule.kind} over {steps} steps, with the factor {mine(done):.4g} at step {done + 1}"
    had = f"the continued run's {theirs.schedule.kind} over {theirs.trainer.steps} had {other(done):.4g}"
    if done < max(warmups):
        allowed = f"schedule.warmup={warmups[1]}, the continued run's in steps"
    elif isinstance(schedule, WsdSchedule) and theirs.schedule.kind == "constant":
        allowed = f"schedule.cooldown={steps - step} or less, since it begins after step {step}; or more trainer.steps"
    else:
        allowed = "schedules that do not follow the length of a run: constant, and wsd up to its cooldown"
    return f"{given}, where {had}; allowed: {allowed}"


def _other_control(ours: Settings, theirs: Settings, step: int) -> str | None:
    """Compare the controls: what a control without state is at each step; else its settings, and the losses it saw."""
    if ours.optimizer.kind != "frugal":
        return None
    for name in _CONTROLS:
        mine, other = (_filled(s, name) for s in (ours, theirs))
        if mine == other and mine is None:
            continue
        if mine is None or other is None:
            had = "null" if other is None else other
            return f"optimizer.{name} is {_value(ours, f'optimizer.{name}')}, and the continued run had {had}"
        if (why := _other_numbers(name, mine, other, step)) is not None:
            return why
        if (why := _other_losses(ours, theirs, _made(name, mine), step)) is not None:
            return why
    return None


def _filled(settings: Settings, name: str) -> dict[str, Any] | None:
    given = getattr(settings.optimizer, name)
    return None if given is None else with_run_length(given, settings.trainer.steps)


def _made(name: str, control: Mapping[str, Any]) -> Control:
    if name == "interval":
        return controls.interval(control)
    return controls.density(density_of_rank(control, _COLUMNS) if name == "rank" else control)


def _other_numbers(name: str, mine: Mapping[str, Any], other: Mapping[str, Any], step: int) -> str | None:
    """Compare what two controls are at the steps before the branch; their settings, if more than the step decides."""
    here, there = _made(name, mine), _made(name, other)
    numbers = [{f.name: getattr(made, f.name) for f in fields(made) if f.init} for made in (here, there)]
    if type(here) is type(there) and numbers[0] == numbers[1]:
        return None
    if not (has_state(here) or has_state(there)) and all(here.at(k) == there.at(k) for k in range(1, step + 1)):
        return None
    if type(here) is not type(there):
        return f"optimizer.{name} is {dict(mine)}, and the continued run had {dict(other)}; allowed: the latter"
    key = next(key for key, value in numbers[0].items() if value != numbers[1][key])
    given, had = (control.get(key, usual[key]) for control, usual in zip((mine, other), numbers, strict=True))
    why = ", since it follows the length of a run unless it is set" if key in ("steps", "every") else ""
    setting = f"optimizer.{name}.{key}"
    return f"{setting} is {given}, and the continued run had {had}; allowed: {setting}={had}{why}"


def _other_losses(ours: Settings, theirs: Settings, control: Control, step: int) -> str | None:
    """Compare the text of the validation losses that a control observes."""
    every, tokens, last = getattr(control, "every", None), theirs.eval.tokens, theirs.eval.last_tokens
    if every is None or getattr(control, "source", "validation") != "validation":
        return None
    if ours.eval.tokens != tokens:
        given = f"eval.tokens is {ours.eval.tokens}, and T of the continued run observed losses of {tokens}"
        return f"{given}; allowed: eval.tokens={tokens}"
    if step == theirs.trainer.steps and step % every == 0 and last not in (None, tokens):
        given = f"T of the continued run observed a loss of eval.last_tokens ({last}) at its last step, {step}"
        return f"{given}, which a longer run does not; allowed: an earlier checkpoint of it"
    return None


def has_state(control: Control) -> bool:
    """Return whether a control is more than a function of the step."""
    return not all(f.init for f in fields(control))


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
    return (_filled(settings, group.rpartition(".")[2]) or {}).get(key)
