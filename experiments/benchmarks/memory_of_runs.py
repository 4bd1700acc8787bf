"""What runs of each kind take, foretold, and how near that is to what the allocator hands out; memory.py prints it.

    python experiments/benchmarks/memory_of_runs.py [--json results.json]

A kind is what is trained, and by how many processes: LLaMAs, other decoders, encoders, adapters; alone, DDP, FSDP. Of
each, two steps and an evaluation are made by the run's own code on a CPU, in processes of their own, and the bytes of
all tensors are counted by the allocator's own events as torch's profiler gives them.
"""

from __future__ import annotations

import gc
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from adafrugal.settings.schema import Settings
from adafrugal.training import few_steps
from adafrugal.training.distributed.ranks import Ranks


def peaks(settings: Settings, ranks: Ranks | None = None, steps: int = 2) -> tuple[int, int]:
    """Bytes that a run had at most while it made steps, from before its model is built, and in an evaluation."""
    gc.collect()  # what is freed later would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop = few_steps.prepared(settings, ranks)
        for step in range(1, steps + 1):
            loop._train_step(loop.task.work(step))
        with record_function("evaluated"):
            loop.task.evaluate(last=False)
    return _most(profiler.profiler.kineto_results.events())


def _most(events: Any) -> tuple[int, int]:
    """The most bytes before the span "evaluated", and in it."""
    (begins,) = (event.start_ns() for event in events if event.name() == "evaluated")
    now, most = 0, [0, 0]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        is_evaluating = event.start_ns() >= begins
        most[is_evaluating] = max(most[is_evaluating], now)
    return most[0], most[1]
