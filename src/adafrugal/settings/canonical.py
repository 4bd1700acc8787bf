"""Fill in the values of null and short forms, and bring equivalent settings into one canonical form."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any

from adafrugal.optim.controls import DENSITIES, INTERVALS, Control

if TYPE_CHECKING:
    from adafrugal.settings.schema import Settings

OF_SIZE = ("value", "start", "end")  # keys of a control that are densities, or ranks


def settled(settings: Settings, epoch: int | None, hidden_size: int) -> Settings:
    """Return a copy of the settings, with nulls that depend on the data and the model filled in.

    `trainer.steps` becomes the steps of `trainer.epochs`, `eval.every` an epoch, a control's `every` an epoch or a
    twentieth of the run, whichever is shorter, and `optimizer.density` the share that `optimizer.rank` selects.

    Args:
        settings: checked.
        epoch: its steps; None if a run has no known epochs, and the settings need none.
        hidden_size: of the model.

    Raises:
        SettingError: a rank above the hidden size.
    """
    found = copy.deepcopy(settings)
    trainer, optimizer = found.trainer, found.optimizer
    if epoch is not None:
        trainer.steps, trainer.epochs = trainer.steps or max(1, round((trainer.epochs or 0) * epoch)), None
        found.eval.every = found.eval.every or epoch
    if optimizer.kind == "frugal":
        for name in ("density", "rank", "interval") if epoch is not None else ():
            control = described(getattr(optimizer, name))
            if "every" in fields_of(control) and control.get("every") is None:
                setattr(optimizer, name, control | {"every": min(epoch, max(1, trainer.steps // 20))})
        if optimizer.rank is not None:
            density = density_of_rank(optimizer.rank, hidden_size)
            is_within = all(density.get(key, 0) <= 1 for key in OF_SIZE)
            optimizer.need(is_within, "rank", f"up to the hidden size, {hidden_size}")
            optimizer.density, optimizer.rank = density, None
    return found


def run_steps(settings: Settings) -> int:
    """Return the steps of the run, or 2⁴⁰, more than any run has, if only its epochs are known."""
    return settings.trainer.steps or 1 << 40


def trained_size(settings: Settings) -> int:
    """Return the vocabulary size of a tokenizer that the run trains."""
    return settings.data.tokenizer.vocabulary_size or min(4096, settings.model.vocabulary_size)


def described(control: Any) -> dict[str, Any]:
    """Return a control's settings as a mapping; a plain number means constant."""
    return dict(control) if isinstance(control, dict) else {"kind": "constant", "value": control}


def fields_of(control: Mapping[str, Any]) -> Mapping[str, Field[Any]]:
    """Return the fields of the class that a mapping describes; none if there is no such class."""
    kind = control.get("kind")
    found = (DENSITIES | INTERVALS).get(kind) if isinstance(kind, str) else None
    return {f.name: f for f in fields(found) if f.init} if found else {}


def density_of_rank(rank: Any, hidden_size: int) -> dict[str, Any]:
    """Convert a control of ranks, in columns of `hidden_size`, to a control of densities."""
    return {key: v / hidden_size if key in OF_SIZE else v for key, v in described(rank).items()}


def with_run_length(control: Any, steps: int) -> dict[str, Any]:
    """Fill in a control's nulls: a decay lasts the run, a loss is observed 20 times in it.

    A decay whose `steps` are a fraction below 1 lasts that share of the run.
    """
    filled = described(control)
    own = fields_of(filled)
    if "steps" in own:
        given = filled.get("steps")
        is_share = isinstance(given, float) and 0 < given < 1
        filled["steps"] = steps if given is None else max(1, round(given * steps)) if is_share else given
    if "every" in own and filled.get("every") is None:
        filled["every"] = max(1, steps // 20)
    return filled


def spelled(given: Any, kinds: Mapping[str, type[Control]], s: Settings) -> dict[str, Any]:
    """Return a control's settings in canonical form: floats for real values, null for a default of this run."""
    control = described(given)
    kind = control["kind"]
    for key, filled in with_run_length({"kind": kind}, run_steps(s)).items():
        in_epochs = key == "every" and s.task.has_epochs  # null means an epoch there
        if key != "kind" and not in_epochs and control.get(key) == filled:
            control[key] = None
    is_count = kinds is INTERVALS and kind == "constant"
    real = {f.name for f in fields(kinds[kind]) if f.type in ("float", float) and not is_count}
    return {key: float(value) if key in real else value for key, value in control.items()}
