"""The learning rate's factor at each step, for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import math
from collections.abc import Callable

from adafrugal.settings.schedule_settings import ConstantSchedule, WsdSchedule


def factor(settings: ConstantSchedule, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the steps already made, for a run of `steps`.

    All schedules begin with a warm-up over W steps, `t/W`, as in FRUGAL's scripts: the first step has rate 0 and only
    fills the moments. Then, with `x = (t − W)/(C − W)`: constant 1; linear `1 − (1 − f)·x`; cosine
    `f + (1 − f)·½(1 + cos πx)`; wsd 1, and in the last D steps linear with `x = (t − (C − D))/D`. f is the floor, C the
    steps of the run, or the cycle of a schedule with restarts.
    """
    cycle = getattr(settings, "cycle", None) or steps
    warmup, floor = settings.warmup_steps(cycle), getattr(settings, "floor", 1.0)
    begin = cycle - settings.cooldown_steps(cycle) if isinstance(settings, WsdSchedule) else warmup  # of the decay

    def at(done: int) -> float:
        t = done % cycle if settings.kind == "cosine_restarts" else min(done, cycle)
        if t < warmup:
            return t / warmup
        x = max(0, t - begin) / (cycle - begin)
        if settings.kind.startswith("cosine"):
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x))
        return 1 - (1 - floor) * x

    return at
