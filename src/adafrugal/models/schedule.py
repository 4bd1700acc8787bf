"""The learning rate's factor at each step, for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import math
from collections.abc import Callable

from adafrugal.settings.schema import ConstantSchedule


def factor(settings: ConstantSchedule, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the steps already made, for a run of `steps`.

    All schedules begin with a warm-up over W steps, `t/W`, as in FRUGAL's scripts: the first step has rate 0 and only
    fills the moments. Then, with `x = (t − W)/(C − W)`: constant 1; linear `1 − (1 − f)·x`; cosine
    `f + (1 − f)·½(1 + cos πx)`. f is the floor, C the steps of the run, or the cycle of a schedule with restarts.
    """
    cycle = getattr(settings, "cycle", None) or steps
    warmup = cycle // 10 if settings.warmup is None else settings.warmup
    if isinstance(warmup, float):
        warmup = min(math.ceil(warmup * cycle), cycle - 1)
    floor = getattr(settings, "floor", 1.0)

    def at(done: int) -> float:
        t = done % cycle if settings.kind == "cosine_restarts" else min(done, cycle)
        if t < warmup:
            return t / warmup
        x = (t - warmup) / (cycle - warmup)
        if settings.kind.startswith("cosine"):
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x))
        return 1 - (1 - floor) * x

    return at
