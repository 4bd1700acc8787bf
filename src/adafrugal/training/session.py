"""From settings to a record: recognise a finished run, lock its directory, make the rest, note how it ended."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from adafrugal.settings.identity import Identity, identify
from adafrugal.settings.schema import Settings
from adafrugal.system import files
from adafrugal.system.errors import INTERRUPTED, SettingError, line
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record, Unwritten
from adafrugal.training import failure
from adafrugal.training.distributed.ranks import LostError, Ranks, is_alone, is_first

Outcome = Literal["finished", "finished before", "interrupted"]


def run(settings: Settings, choices: Mapping[str, str], stop: Stop | None = None) -> tuple[Record, Outcome]:
    """Start or continue the run that these settings describe.

    Args:
        settings: of the run.
        choices: group -> file that was chosen.
        stop: entered already by a caller that makes several runs; None: this run makes one.

    Returns:
        The record and the outcome; the same call continues an interrupted run.

    Raises:
        SettingError: an input is missing, or the data differ from those at the start of the run.
        TrainingError: the run failed.
        KeyboardInterrupt: a signal arrived before training, or a second one during it.
    """
    identity = identify(settings, choices)
    record = Record(identity.directory) if is_first() else Unwritten(identity.directory)
    if is_alone() and record.status == "finished":  # with several processes rank 0 looks, once they have met
        return record, "finished before"
    with Stop() if stop is None else nullcontext(stop) as stop, ExitStack() as ends:
        ends.callback(gc.collect)  # model and optimizer refer to each other; a sweep's next run needs their memory
        ends.callback(setattr, stop, "training", False)
        session = Session(settings, settings, identity, record, stop, Ranks.of_environment(settings.trainer), ends)
        try:
            return record, session.make()
        except BaseException as caught:  # record it before waiting for anything: a scheduler may not wait
            error = session.note(caught)
            if error is caught:
                raise
            raise error from caught


@dataclass
class Session:
    """One process's work on one run.

    Args:
        settings: of the run.
        made: the same, completed by choices that depend on data, model and device.
        identity: its directory and name.
        record: its files.
        stop: whether a signal asked for its end.
        ranks: its processes.
        ends: closes its resources when it ends.
    """

    settings: Settings
    made: Settings
    identity: Identity
    record: Record
    stop: Stop
    ranks: Ranks
    ends: ExitStack
    begun: bool = False

    def make(self) -> Outcome:
        """Begin or continue the run; rank 0 alone writes."""
        self.ends.callback(self.ranks.leave)
        self.ranks.join(self.settings.trainer)
        if self.ranks.first:
            self._lock()
        if self.ranks.tell(self.record.status) == "finished":  # by a process that held the lock until now
            return "finished before"
        from adafrugal.training.run import Run  # needs torch, which the checks before it do not

        return Run(self).train()

    def begin(self) -> None:
        """Begin the record; from here on this session sets its status."""
        self.record.begin(self.config())
        self.begun = True

    def config(self) -> dict[str, Any]:
        """The settings without run_root and cache_root: a record may be moved, published, or sent to W&B."""
        return {key: value for key, value in asdict(self.settings).items() if key not in ("run_root", "cache_root")}

    def note(self, caught: BaseException) -> BaseException:
        """Write what ended the run into the record, tell the other processes, and return the error to raise."""
        error = (
            caught if self.stop.was_lost else failure.explained(caught, self.ranks, self.made, self.record.directory)
        )
        end = failure.classify(error, self.stop)
        if end.code == INTERRUPTED and isinstance(error, Exception):
            error = KeyboardInterrupt()
        if self.begun:
            with suppress(OSError):  # a full disk, for example: the error is reported all the same
                if end.code == INTERRUPTED:
                    self.record.set_status("interrupted")
                else:
                    self.record.set_status("failed", reason=end.reason[:1000])
        return LostError(line(error), is_told=True) if self.ranks.announce(error) else error

    def _lock(self) -> None:
        """Hold the run's directory, which one process writes at a time."""
        directory, given = self.identity.directory, f"run_root is {self.settings.run_root}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ".lock").touch()
        except OSError as error:
            raise SettingError(f"{given}: {error.strerror}; choose a directory that can be written to") from error
        try:
            self.ends.enter_context(files.locked(directory / ".lock"))
        except BlockingIOError as error:
            reason = "is being written by another process; wait for it or change arm"
            raise SettingError(f"{directory} {reason}") from error
        except OSError as error:
            raise SettingError(
                f"{given}, whose file system has no locks ({error.strerror}); two processes could write one run "
                "there: choose a directory on another"
            ) from error


def unless_at_once(end: Callable[[], None]) -> Callable[..., None]:
    """For `ExitStack.push`: call `end`, except after an interruption, which must not wait."""

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or issubclass(kind, Exception):
            end()

    return close
