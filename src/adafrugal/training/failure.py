"""How a run ends: from any error to an exit code and one line, without torch."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path
from typing import NamedTuple

from adafrugal.settings.schema import Settings
from adafrugal.system.errors import (
    FAILED,
    INTERRUPTED,
    WRONG,
    MemoryRefusedError,
    RunError,
    SettingError,
    TrainingError,
    first_line,
    line,
)
from adafrugal.system.signals import Stop
from adafrugal.training.distributed.ranks import LostError, Ranks

# errors of a disk that is full, read-only, someone else's, broken or gone
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


class End(NamedTuple):
    """How a run ended."""

    code: int  # the exit code of the command
    reason: str = ""  # in one line, for the list of a sweep's jobs
    text: str = ""  # for stderr; empty if another process prints it
    is_shared: bool = False  # other jobs of a sweep would end so, too


def explained(error: BaseException, stop: Stop, ranks: Ranks, settings: Settings, directory: Path) -> BaseException:
    """What ended a run, from the error that was raised: a signal, another process, disk, memory, or the error itself.

    `settings` and `directory` are the run's; messages quote them.
    """
    if not isinstance(error, Exception):
        return error
    if stop.was_lost:  # the error may be its consequence
        return KeyboardInterrupt()
    if lost := ranks.lost(error):
        return lost
    if isinstance(error, SettingError | TrainingError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        said = f"{error.filename or directory}: {error.strerror}"
        return TrainingError(f"{said}; complete checkpoints stay, and the same command continues from the last one")
    from adafrugal.memory import out_of_memory  # which needs torch

    memory = out_of_memory.reason(error, settings)
    return MemoryRefusedError(memory) if memory else error


def reason(error: Exception) -> str:
    """The cause of a failure in one line, for the record and the list of a sweep's jobs."""
    if isinstance(error, MemoryRefusedError):
        return first_line(error)
    is_foreseen = isinstance(error, SettingError | TrainingError)
    return line(error) if is_foreseen else f"{type(error).__name__}: {line(error)}"


def classify(error: BaseException) -> End:
    """Classify an error as an interruption, a wrong setting, a failure or a defect."""
    if not isinstance(error, Exception):
        return End(INTERRUPTED, text="interrupted; the same command continues")
    if isinstance(error, SettingError):
        return End(WRONG, reason(error), f"error: {reason(error)}", is_shared=not isinstance(error, RunError))
    if isinstance(error, TrainingError):
        is_told = isinstance(error, LostError) and error.is_told
        text = str(error) if isinstance(error, MemoryRefusedError) else reason(error)
        return End(FAILED, reason(error), "" if is_told else f"error: {text}")
    return End(FAILED, reason(error), "".join(traceback.format_exception(error)).rstrip())
