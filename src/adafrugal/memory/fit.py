"""Find the largest micro-batch and the largest density whose estimate fits a budget: tensors alone, or a whole card."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from adafrugal.memory import card
from adafrugal.memory.built import hidden_size
from adafrugal.memory.card import GIB, Budget
from adafrugal.memory.estimate import estimate, shared
from adafrugal.memory.on_device import with_chunks
from adafrugal.memory.trace import Footprint
from adafrugal.settings.canonical import settled
from adafrugal.settings.compose import refuse_impossible
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError


@dataclass(frozen=True)
class Fitted:
    """The density ρ chosen for the start of a run, and the estimated bytes that count: of tensors, or of the card."""

    density: float
    peak: int


def largest_micro_batch(settings: Settings, budget: Budget) -> int | None:
    """The largest divisor of the batch whose estimate fits; None where not even 1 does.

    With `trainer.update_in_backward`, which does not divide a batch, it is the largest batch.
    """
    own = settings.trainer.batch_size // shared(settings.trainer)
    sizes, memory = [n for n in range(1, own + 1) if own % n == 0], int(budget.gib * GIB)
    above = bisect_left(sizes, True, key=lambda n: not budget.holds(_peak(settings, rows=n, memory=memory)))
    return sizes[above - 1] if above else None


def largest_density(settings: Settings, budget: Budget, candidates: Sequence[float]) -> Fitted | None:
    """The largest of ascending densities whose estimate fits; None where none does."""
    peaks: dict[float | None, int] = {}  # without densities too small to select anything

    def is_above(density: float) -> bool:
        with suppress(SettingError):
            peaks[density] = budget.takes(_peak(settings, density=density))
        return peaks.get(density, 0) > budget.gib * GIB

    above = bisect_left(candidates, True, key=is_above)
    chosen = candidates[above - 1] if above else None
    return Fitted(chosen, peaks[chosen]) if chosen in peaks else None


def fitted(settings: Settings) -> Fitted:
    """The density at which a run begins under the budget of its settings: the one set, or the largest that fits.

    It looks among hundredths.

    Raises:
        SettingError: no density fits, or the one set selects nothing.
    """
    settings = settled(settings, None, hidden_size(settings))
    budget, density = card.of_settings(settings), settings.optimizer.density
    assert budget is not None
    highest, lowest = (density["start"], density["end"]) if "start" in density else (density["value"], 0.0)
    peak = _peak(settings, density=highest)
    if budget.holds(peak):
        return Fitted(highest, budget.takes(peak))
    trains_all = settings.optimizer.state_free != "none"
    hundredths = (n / 100 for n in range(math.ceil(lowest * 100), math.ceil(highest * 100)))
    candidates = sorted(share for share in {lowest, *hundredths} if share or trains_all)
    if (found := largest_density(settings, budget, candidates)) is not None:
        return found
    for share in (*candidates, highest):
        with suppress(SettingError):  # too small to select anything, as `highest` is not
            least = _peak(settings, density=share)
            break
    needs = math.ceil(budget.takes(least) / GIB * 100) / 100
    raise SettingError(
        f"{budget.name} is {budget.gib:g}; allowed: {needs:.2f} or more, the "
        f"estimate with ρ {share:g} (its peak is in the {least.phase} phase); docs/memory.md has what lowers it"
    )


def within_budget(settings: Settings) -> Settings:
    """The settings with the density at which a run begins under the budget of its settings, if they have one.

    Raises:
        SettingError: as of `fitted`.
    """
    return beginning_with(settings, fitted(settings).density) if card.of_settings(settings) else settings


def beginning_with(settings: Settings, density: float) -> Settings:
    """The same settings with another density at the start of the run."""
    changed = settled(settings, None, hidden_size(settings))
    control = changed.optimizer.density
    control["start" if "start" in control else "value"] = density
    return changed


def _peak(
    settings: Settings, rows: int | None = None, density: float | None = None, memory: int | None = None
) -> Footprint:
    """The estimated peak with micro-batches of `rows`, a constant density, or a GPU of `memory` bytes."""
    changed, processes = copy.deepcopy(settings), shared(settings.trainer)
    if rows is not None:
        changed.trainer.micro_batch_size = rows
        if changed.trainer.update_in_backward:
            changed.trainer.batch_size = rows * processes
    if density is not None:
        changed.optimizer.density, changed.optimizer.rank = {"kind": "constant", "value": density}, None
    refuse_impossible(changed)
    return estimate(with_chunks(changed, memory, processes)).peak
