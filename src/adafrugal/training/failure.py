"""How a run ends: from any error to an exit code and one line, without torch."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path
from typing import NamedTuple

from adafrugal.settings.schema import Settings
from adafrugal.system.errors import FAILED, INTERRUPTED, WRONG, SettingError, TrainingError, line
from adafrugal.system.signals import Stop
from adafrugal.training.distributed.ranks import LostError, Ranks

# errors of a disk that is full, read-only, someone else's, broken or gone
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


class End(NamedTuple):
    """How a run ended.

    Args:
        code: the exit code of the command.
        reason: in one line, for the record and the list of a sweep's jobs; empty if there is none.
        text: for stderr; empty if another process prints it.
    """

    code: int
    reason: str = ""
    text: str = ""


def classify(error: BaseException, stop: Stop) -> End:
    """Classify an error as an interruption, a wrong setting, a failure or a defect."""
    if stop.was_lost or not isinstance(error, Exception):
        return End(INTERRUPTED, text="interrupted; the same command continues")
    reason = line(error)
    if isinstance(error, SettingError):
        return End(WRONG, reason, f"error: {reason}")
    if isinstance(error, TrainingError):
        return End(FAILED, reason, "" if isinstance(error, LostError) and error.is_told else f"error: {reason}")
    return End(FAILED, f"{type(error).__name__}: {reason}", "".join(traceback.format_exception(error)).rstrip())


def explained(error: BaseException, ranks: Ranks, settings: Settings, directory: Path) -> BaseException:
    """Return a TrainingError if the disk, memory or another process is at fault; return other errors unchanged.

    Args:
        error: that ended the run.
        ranks: the processes of the run.
        settings: of the run; the message quotes their values.
        directory: of the run.
    """
    if lost := ranks.lost(error):
        return lost
    if not isinstance(error, Exception) or isinstance(error, SettingError | TrainingError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        said = f"{error.filename or directory}: {error.strerror}"
        return TrainingError(f"{said}; complete checkpoints stay, and the same command continues from the last one")
    from adafrugal.memory import out_of_memory  # which needs torch

    reason = out_of_memory.reason(error, settings)
    return TrainingError(reason) if reason else error
