"""Whether a run may go on from another run's checkpoint.

The rule: the continued run must have the past that this run would have had. Every setting on which the steps up to the
branch depend is the same; the schedule and the controls may differ where their numbers at these steps do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import reduce
from typing import Any

from adafrugal.optim import controls
from adafrugal.optim.controls import Control
from adafrugal.settings.canonical import density_of_rank, with_run_length
from adafrugal.settings.identity import CONTINUE_FROM, differing
from adafrugal.settings.schedule import factor
from adafrugal.settings.schedule_settings import WsdSchedule
from adafrugal.settings.schema import Settings

CONTROLS = ("density", "rank", "interval")
_LATER = ("trainer.steps", CONTINUE_FROM, "trainer.log_every", "schedule.", "eval.")  # compared by numbers, or not
_COLUMNS = 1 << 20  # above any model's hidden size, so that a rank is a density


def another_past(ours: Settings, theirs: Settings, step: int) -> str | None:
    """Return why a run cannot go on from another's checkpoint of a step, and what to set; None if it can."""
    if ours.trainer.steps <= step:
        return f"trainer.steps is {ours.trainer.steps}; allowed: above {step}, the step of the checkpoint"
    return _other_setting(ours, theirs) or _other_rate(ours, theirs, step) or _other_control(ours, theirs, step)


def _other_setting(ours: Settings, theirs: Settings) -> str | None:
    mine, other = differing(ours), differing(theirs)
    is_frugal = ours.optimizer.kind == theirs.optimizer.kind == "frugal"
    later = (*_LATER, *(f"optimizer.{name}" for name in CONTROLS)) if is_frugal else _LATER
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
    for name in CONTROLS:
        mine, other = (filled(s, name) for s in (ours, theirs))
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


def filled(settings: Settings, name: str) -> dict[str, Any] | None:
    """Return a control of the optimizer's with what follows the length of the run filled in."""
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
