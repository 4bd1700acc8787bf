"""From settings to a record: recognise a finished run, lock its directory, make the rest, note how it ended."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from adafrugal.settings import checkpoint_names
from adafrugal.settings.identity import CHECKPOINTS, Identity, identify
from adafrugal.settings.schema import Settings
from adafrugal.system import files
from adafrugal.system.errors import RunError, SettingError
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record, Unwritten
from adafrugal.training import failure, lineage
from adafrugal.training.distributed.ranks import Ranks, is_alone, is_first

_BEFORE_IT_BEGINS = ("config.yaml", "status.json", "events.jsonl")  # files of a run whose status is created
_LOCK = ".lock"

Outcome = Literal["finished", "finished before", "interrupted"]


def run(settings: Settings, choices: Mapping[str, str], stop: Stop | None = None) -> tuple[Record, Outcome]:
    """Start or continue the run that these settings describe; `choices` has the file chosen of each group.

    A caller that makes several runs passes the `stop` that it has entered. The same call continues an interrupted run.

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
    """One process's work on one run."""

    settings: Settings
    made: Settings  # the same, completed by choices that depend on data, model and device
    identity: Identity
    record: Record
    stop: Stop
    ranks: Ranks
    ends: ExitStack  # closes the run's resources
    holds: bool = False  # the lock of the run's directory
    begun: bool = False  # the record, so that this session sets its status

    def make(self) -> Outcome:
        """Begin or continue the run; rank 0 alone writes."""
        self.ends.callback(self.ranks.leave)
        self.ranks.join(self.settings.trainer)
        if self.ranks.first:
            if self.settings.trainer.continue_from and not self.has_checkpoints():
                lineage.refuse_another_past(self.settings)
            self._lock()
        if self.ranks.tell(self.record.status) == "finished":  # by a process that held the lock until now
            return "finished before"
        from adafrugal.training.run import Run  # needs torch, which the checks before it do not

        return Run(self).train()

    def config(self) -> dict[str, Any]:
        """The settings without directories of this machine: a record may be moved, published, or sent to W&B."""
        found = {key: value for key, value in asdict(self.settings).items() if key not in ("run_root", "cache_root")}
        for setting in CHECKPOINTS:
            group, _, key = setting.rpartition(".")
            is_needed = found[group].get("kind") == "encoder"  # by its evaluation, which reads its tokenizer there
            if (begins := found[group].get(key)) is not None and not is_needed:
                found[group][key] = checkpoint_names.name(begins)
        return found

    def has_checkpoints(self) -> bool:
        """Whether there are checkpoints of this run, whole or not."""
        return any((self.record.directory / "checkpoints").glob("step-*"))

    def note(self, caught: BaseException) -> BaseException:
        """Record what ended the run, tell the other processes, and return the error to raise."""
        error = failure.explained(caught, self.stop, self.ranks, self.made, self.record.directory)
        with suppress(OSError):  # a full disk, for example: the error is reported all the same
            if isinstance(error, SettingError) and self._has_begun_nothing():
                self._leave_nothing()
            elif self.begun and isinstance(error, Exception):
                self.record.set_status("failed", reason=failure.reason(error)[:1000])
            elif self.begun:
                self.record.set_status("interrupted")
        return self.ranks.announce(error)

    def _has_begun_nothing(self) -> bool:
        """Whether the run's directory, of which this process holds the lock, has nothing that took work."""
        is_new = self.holds and self.record.status in (None, "created")
        return is_new and {file.name for file in self.identity.directory.iterdir()} <= {_LOCK, *_BEFORE_IT_BEGINS}

    def _leave_nothing(self) -> None:
        """Remove the run's directory, the lock last: from then on another process may begin the run in it."""
        directory = self.identity.directory
        for name in (*_BEFORE_IT_BEGINS, _LOCK):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()
        directory.parent.rmdir()  # unless there are other runs in it

    def _lock(self) -> None:
        """Hold the run's directory, which one process writes at a time."""
        directory, given = self.identity.directory, f"run_root is {self.settings.run_root}"
        try:
            self.ends.enter_context(files.locked(directory / _LOCK))
            self.holds = True
        except BlockingIOError as error:
            reason = "is being written by another process; wait for it or change arm"
            raise RunError(f"{directory} {reason}") from error
        except OSError as error:
            if error.filename:
                raise SettingError(f"{given}: {error.strerror}; choose a directory that can be written to") from error
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
