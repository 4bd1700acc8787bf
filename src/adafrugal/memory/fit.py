"""Find the largest micro-batch and the largest density whose estimate fits a budget of GiB."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from adafrugal.memory.built import hidden_size
from adafrugal.memory.estimate import estimate, shared
from adafrugal.memory.on_device import with_chunks
from adafrugal.memory.trace import Footprint
from adafrugal.settings.canonical import settled
from adafrugal.settings.compose import refuse_impossible
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError

GIB = 2**30


@dataclass(frozen=True)
class Fitted:
    """The density ρ chosen for the start of a run, and its estimated peak in bytes."""

    density: float
    peak: int


def largest_micro_batch(settings: Settings, gib: float) -> int | None:
    """The largest divisor of the batch whose estimate fits; None where not even 1 does.

    With `trainer.update_in_backward`, which does not divide a batch, it is the largest batch.
    """
    own = settings.trainer.batch_size // shared(settings.trainer)
    sizes = [n for n in range(1, own + 1) if own % n == 0]
    above = bisect_left(sizes, True, key=lambda n: _peak(settings, rows=n, memory=int(gib * GIB)).total > gib * GIB)
    return sizes[above - 1] if above else None


def largest_density(settings: Settings, gib: float, candidates: Sequence[float]) -> Fitted | None:
    """The largest of ascending densities whose estimate fits; None where none does."""
    peaks: dict[float | None, int] = {}  # without densities too small to select anything

    def is_above(density: float) -> bool:
        with suppress(SettingError):
            peaks[density] = _peak(settings, density=density).total
        return peaks.get(density, 0) > gib * GIB

    above = bisect_left(candidates, True, key=is_above)
    chosen = candidates[above - 1] if above else None
    return Fitted(chosen, peaks[chosen]) if chosen in peaks else None


def fitted(settings: Settings) -> Fitted:
    """The density at which a run under `optimizer.fit_gib` begins: the one set, or the largest hundredth that fits.

    Raises:
        SettingError: no density fits, or the one set selects nothing.
    """
    settings = settled(settings, None, hidden_size(settings))
    gib, density = settings.optimizer.fit_gib, settings.optimizer.density
    highest, lowest = (density["start"], density["end"]) if "start" in density else (density["value"], 0.0)
    if (peak := _peak(settings, density=highest).total) <= gib * GIB:
        return Fitted(highest, peak)
    trains_all = settings.optimizer.state_free != "none"
    hundredths = (n / 100 for n in range(math.ceil(lowest * 100), math.ceil(highest * 100)))
    candidates = sorted(share for share in {lowest, *hundredths} if share or trains_all)
    if (found := largest_density(settings, gib, candidates)) is not None:
        return found
    for share in (*candidates, highest):
        with suppress(SettingError):  # too small to select anything, as `highest` is not
            least = _peak(settings, density=share)
            break
    raise SettingError(
        f"optimizer.fit_gib is {gib:g}; allowed: {math.ceil(least.total / GIB * 100) / 100:.2f} or more, the "
        f"estimate with ρ {share:g} (its peak is in the {least.phase} phase); docs/memory.md has what lowers it"
    )


def within_budget(settings: Settings) -> Settings:
    """The settings with the density at which a run under `optimizer.fit_gib` begins, if that is set.

    Raises:
        SettingError: as of `fitted`.
    """
    is_set = getattr(settings.optimizer, "fit_gib", None) is not None
    return beginning_with(settings, fitted(settings).density) if is_set else settings


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
