"""What a GPU must have for a run: the tensors that are estimated, what torch keeps beyond them, CUDA's context."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from adafrugal.memory.trace import Footprint

GIB = 2**30
# Fitted to memory.json and llama_7b.json of experiments/results/gpu (60M to 7B on an H100, eager, without expandable
# segments): none of these runs kept more beyond its tensors than both together, and the mean is 0.26 GiB less. Weights
# and state stay in their places; what comes and goes leaves gaps.
KEPT = int(0.35 * GIB)
KEPT_OF_WHAT_COMES_AND_GOES = 0.10
CONTEXT = int(0.86 * GIB)  # the same runs: 0.75 to 0.86, with 0.86 in processes that had computed an SVD


def reserve(peak: Footprint) -> int:
    """Bytes that torch's allocator keeps beyond the tensors of a peak, as an upper bound from measurements."""
    return KEPT + int(KEPT_OF_WHAT_COMES_AND_GOES * (peak.gradients + peak.activations + peak.temporaries))


def needed(peak: Footprint) -> int:
    """Bytes that a card must have for a run with this peak of tensors."""
    return held(peak) + CONTEXT


def held(peak: Footprint) -> int:
    """Bytes that torch's allocator holds on a GPU at this peak."""
    return peak.total + reserve(peak)


def within_limit(gib: float) -> int:
    """Bytes that torch's allocator may hold for a process to stay within so many GiB of the card, context included."""
    return max(0, int(gib * GIB) - CONTEXT)


def usable(gigabytes: float) -> float:
    """GiB that torch sees of a card sold as so many GB: half a GiB less, from 32 GB on one.

    Torch's errors name 7.5 to 7.8 GiB on cards of 8 GB, 11.5 to 11.9 of 12, 15.5 to 15.9 of 16, 23.5 to 23.7
    of 24, 79.1 to 79.3 of 80. With ECC in GDDR memory (T4, A10, L4) it is a sixteenth less; a display takes some more.
    """
    return gigabytes - (0.5 if gigabytes < 32 else 1.0)


@dataclass(frozen=True)
class Budget:
    """GiB that an estimate must stay under."""

    gib: float
    name: str  # the setting or option that says so
    whole: bool = False  # of what the card must have; else of tensors alone

    def takes(self, peak: Footprint) -> int:
        """Bytes of a peak that count."""
        return needed(peak) if self.whole else peak.total

    def holds(self, peak: Footprint) -> bool:
        """Whether a peak fits."""
        return self.takes(peak) <= self.gib * GIB


def of_settings(settings: Settings) -> Budget | None:
    """The budget of `optimizer.fit_gib` or `optimizer.fit_card_gib`; None where neither is set."""
    for name, whole in (("fit_gib", False), ("fit_card_gib", True)):
        if (gib := getattr(settings.optimizer, name, None)) is not None:
            return Budget(gib, f"optimizer.{name}", whole)
    return None


def of_words(words: str) -> Budget:
    """The budget of `--fits`: GiB of tensors such as "14.5", or a card's size such as "16GB".

    Raises:
        SettingError: it is neither.
    """
    number = words.upper().removesuffix("GB")
    whole = number != words.upper()
    try:
        size = float(number)
    except ValueError:
        size = math.nan
    gib = usable(size) if whole else size
    if not 0 < gib < math.inf:
        raise SettingError(f"--fits is {words}; allowed: GiB of tensors above 0, such as 14.5, or a card's size: 16GB")
    return Budget(gib, f"--fits {words}", whole)
