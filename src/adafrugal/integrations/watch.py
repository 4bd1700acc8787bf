"""What the callback of every trainer does with a Frugal: find it, know when it observes a loss, report its state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from adafrugal.optim import Frugal


def find_frugal(*optimizers: Any) -> Frugal:
    """Return the Frugal among a trainer's optimizers, or inside their wrappers.

    Wrappers keep it as `optimizer` (accelerate, Lightning), in `parts` (`Several`) or in `optimizers` (torchtitan).

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [inner for optimizer in optimizers for inner in _inside(optimizer) if isinstance(inner, Frugal)]
    if len(found) != 1:
        given = ", ".join(type(inner).__name__ for each in optimizers for inner in _inside(each)) or "nothing"
        raise ValueError(
            f"one Frugal is needed; the trainer's optimizers are {given}: give it Frugal(groups), not a name"
        )
    return found[0]


def _inside(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and, from the outside in, what it wraps."""
    yield optimizer
    wrapped = getattr(optimizer, "optimizer", None)
    for inner in (wrapped, *getattr(optimizer, "parts", ()), *getattr(optimizer, "optimizers", ())):
        if isinstance(inner, torch.optim.Optimizer):
            yield from _inside(inner)


def steps_made(optimizer: Frugal) -> int:
    """Return the number of optimizer steps made, without those left out; it is part of the optimizer's state."""
    steps: int = optimizer.param_groups[0]["steps"]
    return steps


def observes_every(optimizer: Frugal) -> int | None:
    """Return the number of optimizer steps between two validation losses that a control reads; None if none does.

    Raises:
        ValueError: controls differ in `every`, or one reads the training loss.
    """
    split = [group for group in optimizer.param_groups if group["split"]]
    controls: list[Any] = [control for group in split for control in (group["density"], group["interval"])]
    reading = [control for control in controls if getattr(control, "every", None) is not None]
    if any(getattr(control, "source", "validation") != "validation" for control in reading):
        raise ValueError(
            "source is 'training'; a trainer's callback is given validation losses alone: set 'validation'"
        )
    every = {control.every for control in reading}
    if len(every) > 1:
        raise ValueError(f"every is {sorted(every)} in several controls; one number is needed")
    return every.pop() if every else None


def warn_if_rare(every: int, steps: float) -> None:
    """Warn if a run of `steps` optimizer steps, if positive and thus known, ends before a loss is observed."""
    if 0 < steps < every:
        what = f"T cannot move: the first loss is observed after {every} steps, the run has {steps}"
        warnings.warn(f"{what}; set every of LossAware", stacklevel=3)


def report(optimizer: Frugal) -> dict[str, float]:
    """Return ρ as last read, T in steps, and the bytes of optimizer state on this process, for a log."""
    return {
        "density": optimizer.density,
        "interval": optimizer.interval,
        "state_bytes": optimizer.state_bytes().total,
    }
