"""Seconds by phase of the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward", "backward", "optimizer", "refresh", "evaluation", "checkpoint")


class PhaseClock:
    """Adds up what each phase takes. On a GPU the phases are measured there, and waited for only in `take`."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._on_gpu = device.type == "cuda"
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body of a `with` as part of a phase."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((phase, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - started

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds that were timed as one phase as another."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last call."""
        if self._pending:
            torch.cuda.synchronize()
            for phase, start, end in self._pending:
                self._seconds[phase] += start.elapsed_time(end) / 1000
            self._pending.clear()
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken
