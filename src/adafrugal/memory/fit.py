"""What fits in so many GiB: the largest micro-batch, and the largest density."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from adafrugal.memory.estimate import estimate
from adafrugal.memory.on_device import with_chunks
from adafrugal.memory.trace import Footprint
from adafrugal.optim import controls
from adafrugal.settings.canonical import settled
from adafrugal.settings.schema import Settings
from adafrugal.settings.validate import refuse_impossible
from adafrugal.system.errors import SettingError

GIB = 2**30
Candidate = TypeVar("Candidate", int, float)


@dataclass(frozen=True)
class Fitted:
    """A density that was chosen.

    Args:
        density: ρ at the start of the run.
        peak: bytes, as estimated at it.
    """

    density: float
    peak: int


def largest_micro_batch(settings: Settings, gib: float) -> int | None:
    """The largest divisor of the batch whose estimate stays under so many GiB; None where not even 1 does.

    With `trainer.update_in_backward` a batch is not divided, and it is the largest batch.
    """
    size = settings.trainer.batch_size
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    sizes = sorted({*small, *(size // n for n in small)})
    return _last(sizes, lambda n: _peak(settings, micro_batch_size=n, memory=int(gib * GIB)).total <= gib * GIB)


def largest_density(settings: Settings, gib: float, candidates: Sequence[float]) -> float | None:
    """The largest of ascending densities whose estimate stays under so many GiB; None where none does."""
    found = _last(candidates, lambda density: _fits(settings, density, gib, otherwise=True))
    return found if found is not None and _fits(settings, found, gib, otherwise=False) else None


def fitted(settings: Settings) -> Fitted:
    """The density at which a run begins that has to stay under `optimizer.fit_gib`.

    It is the one that is set, or the largest below it in steps of 0.01 whose estimate fits.

    Raises:
        SettingError: none does, not even the smallest.
    """
    settings = settled(settings, None, settings.model.hidden_size)
    gib, density = settings.optimizer.fit_gib, settings.optimizer.density
    highest, lowest = (density["start"], density["end"]) if "start" in density else (density["value"], 0.0)
    if (peak := _peak(settings, density=highest).total) <= gib * GIB:
        return Fitted(highest, peak)
    trains_all = settings.optimizer.state_free != "none"
    steps = (n / 100 for n in range(math.ceil(lowest * 100), math.ceil(highest * 100)))
    candidates = sorted(share for share in {lowest, *steps} if share or trains_all)
    found = largest_density(settings, gib, candidates)
    if found is None:
        share, least = _smallest(settings, [*candidates, highest])
        raise SettingError(
            f"optimizer.fit_gib is {gib:g}; allowed: {math.ceil(least.total / GIB * 100) / 100:.2f} or more, the "
            f"estimate with ρ {share:g} (its peak is in the {least.phase} phase); docs/memory.md has what lowers it"
        )
    return Fitted(found, _peak(settings, density=found).total)


def beginning_with(settings: Settings, density: float) -> Settings:
    """The same settings with another density at the start of the run."""
    changed = settled(settings, None, settings.model.hidden_size)
    control = changed.optimizer.density
    control["start" if "start" in control else "value"] = density
    return changed


def _smallest(settings: Settings, candidates: Sequence[float]) -> tuple[float, Footprint]:
    """The first of ascending densities that selects something, and its peak."""
    for density in candidates:
        with suppress(SettingError):
            return density, _peak(settings, density=density)
    raise SettingError(f"optimizer.density: none up to {candidates[-1]:g} selects anything; raise it")


def _last(candidates: Sequence[Candidate], fits: Callable[[Candidate], bool]) -> Candidate | None:
    """The last of the ascending candidates that fits; what is larger than one that does not fit does not, either."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(candidates[middle]) else (low, middle)
    return candidates[low - 1] if low else None


def _fits(settings: Settings, density: float, gib: float, otherwise: bool) -> bool:
    """Whether it does; `otherwise` where a density is too small to select anything, as larger ones are not."""
    try:
        return _peak(settings, density=density).total <= gib * GIB
    except SettingError:
        return otherwise


def _peak(
    settings: Settings, micro_batch_size: int | None = None, density: float | None = None, memory: int | None = None
) -> Footprint:
    changed = copy.deepcopy(settings)
    if micro_batch_size is not None:
        changed.trainer.micro_batch_size = micro_batch_size
        if changed.trainer.update_in_backward:
            changed.trainer.batch_size = micro_batch_size
    if density is not None:
        changed.optimizer.density, changed.optimizer.rank = {"kind": controls.Constant.kind, "value": density}, None
    refuse_impossible(changed)
    return estimate(with_chunks(changed, memory)).peak
