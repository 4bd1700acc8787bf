"""The values that null and short forms stand for, and one spelling for settings that mean the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from adafrugal.optim.controls import INTERVALS, Control

if TYPE_CHECKING:
    from adafrugal.settings.schema import Settings

_OF_SIZE = ("value", "start", "end")  # keys of a control that are densities, or ranks


def settled(settings: Settings, epoch: int | None, hidden_size: int) -> Settings:
    """The same settings, with nulls filled in that depend on the data and the model.

    `trainer.steps` becomes `trainer.epochs` of steps, `eval.every` an epoch, a loss-aware interval's `every` an epoch
    or a twentieth of the run where that is shorter, and `optimizer.density` the share that `optimizer.rank` selects.

    Args:
        settings: checked.
        epoch: its steps; None where a run has no known epochs, and the settings need none.
        hidden_size: of the model.

    Raises:
        SettingError: a rank above the hidden size.
    """
    found = copy.deepcopy(settings)
    if epoch is not None:
        found.trainer.steps = found.trainer.steps or max(1, round((found.trainer.epochs or 0) * epoch))
        found.trainer.epochs = None
        found.eval.every = found.eval.every or epoch
    found.optimizer.settle(found.trainer.steps, epoch, hidden_size)
    return found


def run_steps(settings: Settings) -> int:
    """The steps of the run, or more than any run has where only its epochs are known."""
    return settings.trainer.steps or 1 << 40


def trained_size(settings: Settings) -> int:
    """The number of pieces of a tokenizer that the run trains."""
    return settings.data.tokenizer.vocabulary_size or min(4096, settings.model.vocabulary_size)


def described(control: Any) -> dict[str, Any]:
    """A control's settings as a mapping; a plain number means constant."""
    return dict(control) if isinstance(control, dict) else {"kind": "constant", "value": control}


def density_of_rank(rank: Any, hidden_size: int) -> dict[str, Any]:
    """The density control that selects as many columns of `hidden_size` as a control of ranks says."""
    return {key: v / hidden_size if key in _OF_SIZE else v for key, v in described(rank).items()}


def with_run_length(control: Any, steps: int) -> dict[str, Any]:
    """A control's settings with null filled in: a decay lasts the run, a loss is observed 20 times in it.

    A decay whose `steps` are a share below 1 lasts that share of the run.
    """
    filled = described(control)
    if filled.get("kind") in ("linear", "cosine"):
        given = filled.get("steps")
        is_share = isinstance(given, float) and 0 < given < 1
        filled["steps"] = steps if given is None else max(1, round(given * steps)) if is_share else given
    if filled.get("kind") == "loss_aware" and filled.get("every") is None:
        filled["every"] = max(1, steps // 20)
    return filled


def spelled(given: Any, kinds: Mapping[str, type[Control]], s: Settings) -> dict[str, Any]:
    """A control's settings in one spelling: 1 is 1.0 where a share is meant, and a default of this run is null."""
    control = described(given)
    kind = control["kind"]
    for key, filled in with_run_length({"kind": kind}, run_steps(s)).items():
        in_epochs = key == "every" and s.task.has_epochs  # where null is an epoch
        if key != "kind" and not in_epochs and control.get(key) == filled:
            control[key] = None
    is_count = kinds is INTERVALS and kind == "constant"
    real = {f.name for f in fields(kinds[kind]) if f.type == "float" and not is_count}
    return {key: float(value) if key in real else value for key, value in control.items()}
