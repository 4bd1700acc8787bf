"""Being asked to stop: at once before the first step, after the step in hand from then on, at once when asked again."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType

# the last two are what Slurm sends ahead of a time limit: as a user's script asks for it, and as submitit does
ASKED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def leave_to_the_parent() -> None:
    """In a process that works for another: be ended by it alone, though Slurm sends signals to all of a job's step."""
    for number in ASKED_BY:
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """While entered, `ASKED_BY` set `requested` and, unless the run is `training`, raise KeyboardInterrupt.

    A KeyboardInterrupt in the middle of somebody's import or composition can get lost, or become an error of another
    kind; `was_lost` stays. When training, only a second signal raises.

    Attributes:
        requested: whether somebody asked.
        training: whether a run has begun its steps, which end in order.
        was_lost: whether somebody asked while nothing was training; what is raised since may come of that.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        self.was_lost = False

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in ASKED_BY}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        self.was_lost = self.was_lost or not self.training
        if again or not self.training:
            raise KeyboardInterrupt
        with suppress(OSError):  # there may be nobody left to tell
            os.write(2, b"stopping after this step; a second signal stops at once\n")
