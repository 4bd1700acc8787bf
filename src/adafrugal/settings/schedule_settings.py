"""The settings of learning-rate schedules; `adafrugal.settings.schedule` has their formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adafrugal.settings.canonical import run_steps
from adafrugal.settings.ranges import Part, within

if TYPE_CHECKING:
    from adafrugal.settings.schema import Settings


@dataclass
class ConstantSchedule(Part, path="schedule"):
    """The full learning rate after the warm-up."""

    kind: str = "constant"
    warmup: int | float | None = None  # steps, or a share of the run below 1; null: a tenth of the run

    def period(self, s: Settings) -> int:
        """Return the steps after which the schedule ends or restarts."""
        return run_steps(s)

    def warmup_steps(self, period: int) -> int:
        """Return the steps of the warm-up of a schedule that ends or restarts after `period` steps."""
        if self.warmup is None:
            return period // 10
        return min(math.ceil(self.warmup * period), period - 1) if isinstance(self.warmup, float) else self.warmup

    def check(self, s: Settings) -> None:
        """Require a warm-up shorter than the schedule."""
        steps, is_whole = self.period(s), self.period(s) == run_steps(s)
        many = "as many as its epochs have" if is_whole and not s.trainer.steps else steps
        longest = f"{'trainer.steps' if is_whole else 'schedule.cycle'} ({many})"
        is_below = self.warmup is None or 0 <= self.warmup < (1 if isinstance(self.warmup, float) else steps)
        self.need(is_below, "warmup", f"0 to below {longest}, a share of it below 1, or null for a tenth")

    def canonical(self, s: Settings) -> None:
        """Write a tenth as null, also one that is typed as a share; of a length that is not known that is another."""
        period = self.period(s)
        is_usual = self.warmup_steps(period) == ConstantSchedule().warmup_steps(period)
        self.warmup = None if is_usual else self.warmup


@dataclass
class LinearSchedule(ConstantSchedule):
    """A straight line from the learning rate to `floor` of it at the end of the run."""

    kind: str = "linear"
    floor: float = within(0, 1, 0.0, ", a share of the learning rate")


@dataclass
class CosineSchedule(LinearSchedule):
    """Half a cosine from the learning rate to `floor` of it at the end of the run."""

    kind: str = "cosine"
    floor: float = within(0, 1, 0.1, ", a share of the learning rate")


@dataclass
class RestartingSchedule(CosineSchedule):
    """The cosine with its warm-up, repeated every `cycle` steps."""

    kind: str = "cosine_restarts"
    cycle: int | None = None  # steps; null: the whole run

    def period(self, s: Settings) -> int:
        """Return the steps after which the schedule restarts."""
        return run_steps(s) if self.cycle is None else self.cycle

    def check(self, s: Settings) -> None:
        """Require a cycle no longer than the run."""
        self.need(1 <= self.period(s) <= run_steps(s), "cycle", f"1 to trainer.steps ({run_steps(s)})")
        super().check(s)

    def canonical(self, s: Settings) -> None:
        """Write a warm-up of a tenth of a cycle, and a cycle as long as the run, as null."""
        super().canonical(s)
        self.cycle = None if self.cycle == run_steps(s) else self.cycle


@dataclass
class WsdSchedule(LinearSchedule):
    """Warm-up, the full learning rate, then a straight line to `floor` of it: the cooldown, which ends with the run.

    The name is MiniCPM's (warmup-stable-decay, arXiv 2404.06395); Hägele et al. (arXiv 2405.18392) compare lengths and
    shapes of cooldowns. Up to its cooldown a run is that of `constant` with the same warm-up in steps.
    """

    kind: str = "wsd"
    cooldown: int | float | None = None  # steps, or a share of the run below 1; null: a fifth of the run

    def cooldown_steps(self, steps: int) -> int:
        """Return the steps of the cooldown of a run of `steps`."""
        if self.cooldown is None:
            return max(1, steps // 5)
        return max(1, round(self.cooldown * steps)) if isinstance(self.cooldown, float) else self.cooldown

    def check(self, s: Settings) -> None:
        """Require a warm-up and a cooldown that the run has room for."""
        super().check(s)
        steps, given = run_steps(s), self.cooldown
        longest = steps - self.warmup_steps(steps)
        is_within = given is None or (0 < given < 1 if isinstance(given, float) else given >= 1)
        many = f" ({longest})" if s.trainer.steps else ""
        some = f"1 to the steps after the warm-up{many}, a share of the run above 0 and below 1, or null for a fifth"
        self.need(is_within and self.cooldown_steps(steps) <= longest, "cooldown", some)

    def canonical(self, s: Settings) -> None:
        """Write a tenth and a fifth as null."""
        super().canonical(s)
        steps = s.trainer.steps  # a fifth of a length that is not known is rounded otherwise than a share
        is_usual = steps is not None and self.cooldown_steps(steps) == WsdSchedule().cooldown_steps(steps)
        self.cooldown = None if is_usual else self.cooldown
