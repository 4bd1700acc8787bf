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

# what a disk answers that is full, read-only, another's, broken or gone
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


class End(NamedTuple):
    """How a run ended.

    Args:
        code: the exit code that it has as a command.
        reason: in one line, for its record and for the list of a sweep's jobs; empty where there is nothing to say.
        text: for stderr; empty where another process prints it.
    """

    code: int
    reason: str = ""
    text: str = ""


def classify(error: BaseException, stop: Stop) -> End:
    """The end that an error makes of a run: an interruption, a wrong setting, a failure, or a defect."""
    if stop.was_lost or not isinstance(error, Exception):
        return End(INTERRUPTED, text="interrupted; the same command continues")
    reason = line(error)
    if isinstance(error, SettingError):
        return End(WRONG, reason, f"error: {reason}")
    if isinstance(error, TrainingError):
        return End(FAILED, reason, "" if isinstance(error, LostError) and error.is_told else f"error: {reason}")
    return End(FAILED, f"{type(error).__name__}: {reason}", "".join(traceback.format_exception(error)).rstrip())


def explained(error: BaseException, ranks: Ranks, settings: Settings, directory: Path) -> BaseException:
    """A TrainingError for an error that neither a setting nor this code is the cause of; all others as they are.

    Args:
        error: that ended the run.
        ranks: the processes of the run, one of which may have caused it.
        settings: of the run, whose values are quoted.
        directory: of the run.
    """
    if lost := ranks.lost(error):
        return lost
    if not isinstance(error, Exception) or isinstance(error, SettingError | TrainingError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        said = f"{error.filename or directory}: {error.strerror}"
        return TrainingError(f"{said}; what is whole stays, and the same command goes on from the last checkpoint")
    from adafrugal.memory import out_of_memory  # which needs torch

    reason = out_of_memory.reason(error, settings)
    return TrainingError(reason) if reason else error
