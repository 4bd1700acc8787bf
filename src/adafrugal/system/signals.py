"""Requests to stop: before training a signal interrupts; during it, the first ends the step, the second interrupts."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType

# Slurm sends the last two ahead of a time limit: one as a user's script asks for it, one as submitit does
ASKED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_ASKS_AGAIN = 0.05  # seconds after which a signal within an import is sent again


def leave_to_the_parent() -> None:
    """In a child: ignore the signals by which a run is stopped, which Slurm sends to all processes of a job's step."""
    for number in ASKED_BY:
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """While entered, signals of `ASKED_BY` set `requested`, and raise KeyboardInterrupt unless `training`.

    During training only a second signal raises. A KeyboardInterrupt can get lost, or become an error of another kind;
    `was_lost` stays. A signal within an import waits for its end, since an interrupted extension module may abort.

    Attributes:
        requested: whether a signal arrived.
        training: whether a run has begun its steps.
        was_lost: whether a signal arrived outside training; later errors may be its consequence.
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
            if _is_importing(frame):
                threading.Timer(_ASKS_AGAIN, os.kill, (os.getpid(), number)).start()
                return
            raise KeyboardInterrupt
        with suppress(OSError):  # the reader of stderr may be gone
            os.write(2, b"stopping after this step; a second signal stops at once\n")


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
