"""The signals by which a run is asked to stop, and processes that leave them to the one they work for."""

from __future__ import annotations

import signal

# the last two are what Slurm sends ahead of a time limit: as a user's script asks for it, and as submitit does
ASKED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def leave_to_the_parent() -> None:
    """In a process that works for another: be ended by it alone, though Slurm sends signals to all of a job's step."""
    for number in ASKED_BY:
        signal.signal(number, signal.SIG_IGN)
