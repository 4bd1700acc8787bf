"""Being asked to stop: the first signal ends the run after its step, a second one at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

ASKED_BY = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While entered, SIGINT and SIGTERM set `requested`; a second signal raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in ASKED_BY}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"stopping as soon as the run can be continued; a second signal stops at once\n")
