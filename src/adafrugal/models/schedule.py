"""The learning rate's factor at each step, for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import math
from collections.abc import Callable

from adafrugal.settings.schema import ConstantSchedule


def factor(settings: ConstantSchedule, steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by, as a function of the optimizer steps already made (0 at the first).

    All start with a warm-up over W steps, `t/W`, as FRUGAL's scripts have it: the first step has rate 0 and only
    fills the moments. After it, with `x = (t − W)/(C − W)`: constant 1; linear `1 − (1 − f)·x`; cosine
    `f + (1 − f)·½(1 + cos πx)`, where f is the floor and C the run, or the cycle of a schedule with restarts.

    Args:
        settings: which schedule.
        steps: of the run.
    """
    cycle = getattr(settings, "cycle", None) or steps
    warmup = cycle // 10 if settings.warmup is None else settings.warmup
    if isinstance(warmup, float):
        warmup = min(math.ceil(warmup * cycle), cycle - 1)
    floor = getattr(settings, "floor", 1.0)
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1 - (1 - floor) * x,
        "cosine": lambda x: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)),
    }
    shape = shapes[settings.kind.removesuffix("_restarts")]

    def at(done: int) -> float:
        t = done % cycle if settings.kind == "cosine_restarts" else min(done, cycle)
        return t / warmup if t < warmup else shape((t - warmup) / (cycle - warmup))

    return at
