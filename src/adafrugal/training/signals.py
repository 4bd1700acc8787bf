"""Being asked to stop: at once before the first step, after the step in hand from then on, at once when asked again."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType

ASKED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what Slurm sends ahead of a time limit


class Stop:
    """While entered, `ASKED_BY` set `requested` and, unless the run is `training`, raise KeyboardInterrupt.

    A KeyboardInterrupt in the middle of somebody's import can get lost; `requested` stays. When training, only a
    second signal raises.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False

    @property
    def was_lost(self) -> bool:
        """Whether somebody asked before the training, and the KeyboardInterrupt did not end the process."""
        return self.requested and not self.training

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in ASKED_BY}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.training:
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True
        with suppress(OSError):  # there may be nobody left to tell
            os.write(2, b"stopping after this step; a second signal stops at once\n")
