"""Seconds by phase of the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward", "backward", "optimizer", "refresh", "evaluation", "checkpoint")


class PhaseClock:
    """Sums the seconds of each phase; the time of a nested phase is not counted in the outer one.

    On a GPU phases are timed by events; only `take` waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._on_gpu = device.type == "cuda"
        self._pending: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        self._within: str | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body of a `with` as part of a phase."""
        outer, self._within = self._within, phase
        try:
            if self._on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                yield
                end.record()
                self._pending.append((phase, outer, start, end))
            else:
                started = time.perf_counter()
                yield
                self._add(phase, outer, time.perf_counter() - started)
        finally:
            self._within = outer

    def _add(self, phase: str, outer: str | None, seconds: float) -> None:
        self._seconds[phase] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Move seconds from one phase to another."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last call."""
        if self._pending:
            torch.cuda.synchronize()
            for phase, outer, start, end in self._pending:
                self._add(phase, outer, start.elapsed_time(end) / 1000)
            self._pending.clear()
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken
