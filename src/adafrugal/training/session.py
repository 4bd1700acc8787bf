"""From settings to a record: start, continue or recognise a run."""

from __future__ import annotations

import errno
import fcntl
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adafrugal.settings.canonical import settled
from adafrugal.settings.identity import Identity, differing, identify, still_part
from adafrugal.settings.schema import Settings
from adafrugal.settings.validate import refuse_impossible
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.system.secrets import hidden
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record, Unwritten
from adafrugal.training.distributed import ranks
from adafrugal.training.distributed.ranks import LostError, Ranks

if TYPE_CHECKING:
    from adafrugal.memory.fit import Fitted
    from adafrugal.training.devices import Place
    from adafrugal.training.display import Display
    from adafrugal.training.loop import Loop
    from adafrugal.training.tasks.task import Task


# what a disk answers that is full, read-only, another's, broken or gone
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
Outcome = Literal["finished", "finished before", "interrupted"]


def run(settings: Settings, choices: Mapping[str, str], stop: Stop | None = None) -> tuple[Record, Outcome]:
    """Make the run that these settings describe, or what is missing of it.

    Args:
        settings: of the run.
        choices: group -> file that was chosen.
        stop: entered already, by who makes several runs; None: one of the run's own.

    Returns:
        The record, and how it stands; an interrupted run is continued by the same call.

    Raises:
        SettingError: a missing input, or data that are not those the run began with.
        TrainingError: the run failed.
    """
    identity = identify(settings, choices)
    record = Record(identity.directory) if ranks.is_first() else Unwritten(identity.directory)
    if ranks.is_alone() and record.status == "finished":  # of several processes the first looks, for all
        return record, "finished before"
    # from here on, since an interruption in the middle of somebody's import can get lost
    with Stop() if stop is None else nullcontext(stop) as stop:
        try:
            with ranks.joined(settings.trainer) as processes:
                return record, Session(settings, identity, record, stop, processes).make()
        except Exception as error:
            if stop.was_lost:  # and what was imported by half has failed since
                raise KeyboardInterrupt from error
            reason = _explained(error, settings, record)
            if reason is None:
                raise
            raise TrainingError(reason) from error
        finally:
            stop.training = False
            gc.collect()  # model and optimizer know each other; the next run of a sweep needs their memory


class Session:
    """One process's work on one run. Heavy imports wait in its methods, so that a finished run needs none of them.

    Args:
        settings: of the run.
        identity: its place and name.
        record: its directory.
        stop: whether somebody wants it to end.
        processes: of the run; this is one of them.
    """

    def __init__(self, settings: Settings, identity: Identity, record: Record, stop: Stop, processes: Ranks) -> None:
        self.settings, self.identity, self.record, self.stop = settings, identity, record, stop
        self.ranks = processes
        self._made = settings  # what data, model and device have decided filled in
        self._memory_before = 0

    def make(self) -> Outcome:
        """Begin or continue the run, whose first process is the only one that writes it."""
        # what can be refused without torch is refused before its import
        with self._alone() if self.ranks.first else nullcontext():
            from adafrugal.training import devices
            from adafrugal.training.display import Display

            if self.ranks.tell(self.record.status) == "finished":  # by a process that held the directory until now
                return "finished before"
            notes: list[str] = []
            # before anything else asks CUDA for something, and before the record is touched
            place = devices.open_device(self.settings.trainer, self.ranks.local, notes.append)
            self.record.begin(self._config())
            with Display() as display:
                for note in notes:
                    self._warn(display, note)
                return self._train(display, place)

    def _config(self) -> dict[str, Any]:
        """The settings without where the record lies: it may be moved, published, or sent to W&B."""
        return {key: value for key, value in asdict(self.settings).items() if key not in ("run_root", "cache_root")}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        directory = self.identity.directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / ".lock").open("w")
        except OSError as error:
            reason = f"{error.strerror}; choose a directory that can be written to"
            raise SettingError(f"run_root is {self.settings.run_root}: {reason}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                reason = "is being written by another process; wait for it or change arm"
                raise SettingError(f"{directory} {reason}") from error
            except OSError as error:
                given = f"run_root is {self.settings.run_root}, whose file system has no locks ({error.strerror})"
                raise SettingError(
                    f"{given}; two processes could write one run there: choose a directory on another"
                ) from error
            yield

    def _train(self, display: Display, place: Place) -> Outcome:
        """Train to the end, or until asked to stop."""
        with ExitStack() as ends, self._status():  # which is noted before anything is waited for
            loop = self._set_up(display, ends, place)
            ends.enter_context(self._copied(display))
            ends.push(loop.close)
            self.stop.training = True
            outcome: Outcome = "finished" if loop.fit(self.stop) else "interrupted"
            if outcome == "finished":
                summary = loop.summary()
                if self.ranks.first:
                    self.record.write_summary(self._with_estimate(summary, display))
            self.record.set_status(outcome, step=loop.account.step)
        if outcome == "interrupted":
            display.say(f"interrupted after step {loop.account.step}; the same command continues the run")
        return outcome

    def _with_estimate(self, summary: dict[str, Any], display: Display) -> dict[str, Any]:
        """The summary with what `python -m adafrugal.memory` would have said, beside what was measured."""
        if self.settings.task.kind != "pretrain" or self.settings.trainer.parallel == "fsdp":
            return summary
        from adafrugal.memory import measure
        from adafrugal.memory.estimate import estimate

        try:
            foretold = estimate(self._of_one_process(self._made)).peak
        except Exception as error:  # of whatever kind: a run that is made does not fail for what was to be said of it
            self._warn(display, f"there is no estimate of the memory in the summary: {error}")
            return summary
        summary["memory"] |= measure.beside(foretold.total, summary["memory"]["peak_of_the_run"], self._memory_before)
        summary["memory"] |= {"estimate_phase": foretold.phase, "is_upper_bound": summary["compile"] is not None}
        return summary

    def _of_one_process(self, settings: Settings) -> Settings:
        """Settings of what one of the processes does, which has a part of the batch."""
        trainer = settings.trainer
        rows = trainer.batch_size // self.ranks.size
        micro = min(trainer.micro_batch_size or rows, rows)
        return replace(settings, trainer=replace(trainer, batch_size=rows, micro_batch_size=micro))

    @contextmanager
    def _status(self) -> Iterator[None]:
        """Whatever ends the run, the record's status says it, unless nothing can be written any more."""
        try:
            yield
        except BaseException as caught:
            error = self.ranks.lost(caught) or caught
            if self.stop.was_lost or not isinstance(error, Exception):  # or nobody is left to print to
                with suppress(OSError):  # the error itself is what remains
                    self.record.set_status("interrupted")
                raise
            if isinstance(error, LostError):
                with suppress(OSError):
                    self.record.set_status("failed", reason=hidden(str(error))[:1000])
                raise error from caught
            reason = _explained(error, self._made, self.record)
            named = f"TrainingError: {reason}" if reason else f"{type(error).__name__}: {error}"
            with suppress(OSError):
                self.record.set_status("failed", reason=hidden(named)[:1000])
            if reason is None:
                raise
            raise TrainingError(reason) from error

    def _set_up(self, display: Display, ends: ExitStack, place: Place) -> Loop:
        """Build everything, say what it is, and go to where the run stands; `ends` learns what to close."""
        import torch

        from adafrugal.memory import measure
        from adafrugal.models import optimizers
        from adafrugal.models.schedule import factor
        from adafrugal.training import compiling
        from adafrugal.training.checkpoints import checkpoint
        from adafrugal.training.loop import Loop

        record = self.record
        saved = self._latest_checkpoint(display)
        state = checkpoint.load_state(saved) if saved else None
        known_as = differing(self.settings)
        if state is not None:
            _refuse_another(state, known_as, record)
            place = place.begun_in(state["precision"], self.settings.trainer.precision)
        self._memory_before = measure.begin(place.device)
        settings = self._on_device(place, display)
        task_class, begins_at = _task_class(settings), state["task"] if state else None
        task = task_class(settings, place, display.say, begins_at, self.ranks)
        ends.push(_unless_at_once(task.close))
        settings = settled(settings, task.epoch, task.model.config.hidden_size)
        refuse_impossible(settings)
        settings, fitted = self._within_budget(settings, display, state)
        self._made = settings
        display.expect(settings.trainer.steps)
        optimizers.adapt(settings, task.model)
        groups = optimizers.groups(settings, task.model)
        optimizer = optimizers.build(settings, groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(settings.schedule, settings.trainer.steps))
        loop = Loop(settings, task, optimizer, scheduler, place, record, display, self.ranks)
        loop.known_as = known_as
        loop.account.fitted_density = fitted.density if fitted else None  # or what the checkpoint has, below
        display.say(f"{self.identity.key} → {record.directory}\n\n{groups}\n")
        if saved is not None:
            loop.resume(state, saved)
            display.say(f"continuing after step {loop.account.step}")
        record.go_back_to(loop.account.step)
        if fitted is not None:
            record.add_event("fitted", step=1, **asdict(fitted))  # a run that begins anew tells it anew
        how = compiling.start(task, settings, place, display.say, partial(self._warn, display), self.ranks)
        loop.note_compilation(how)
        if how.mode:  # the next run of a sweep needs the memory, and torch compiles a function 8 times
            ends.callback(compiling.forget)
        self._describe(place, task, loop)
        return loop

    def _on_device(self, place: Place, display: Display) -> Settings:
        """The settings with what is left to the device: precision, micro-batch, rows of logits."""
        from adafrugal.memory import on_device

        free, size = min(self.ranks.gather(place.free())), self.ranks.size
        chooses = place.is_gpu and on_device.chooses_micro_batch(self.settings)
        if chooses:
            display.say("estimating which micro-batch fits: seconds, for 7B a minute")
        try:
            found = on_device.resolved(self.settings, place.precision, place.memory(), free, size)
        except Exception as error:  # of whatever kind: an estimate is no reason for a run not to start
            self._warn(display, f"there is no estimate by which to choose a micro-batch, which is the batch: {error}")
            chooses, trainer = False, replace(self.settings.trainer, micro_batch_size=self.settings.trainer.batch_size)
            found = on_device.resolved(
                replace(self.settings, trainer=trainer), place.precision, place.memory(), free, size
            )
        if chooses and (rows := found.trainer.micro_batch_size) < self.settings.trainer.batch_size // size:
            fits = f"by the estimate more do not fit into {free / 2**30:.1f} GiB"
            display.say(f"micro-batches of {rows} rows: {fits}")
        return found

    def _latest_checkpoint(self, display: Display) -> Path | None:
        """Where the run goes on: the first process looks, and puts damaged ones aside."""
        from adafrugal.training.checkpoints import checkpoint

        found = None
        if self.ranks.first:
            found = checkpoint.latest(self.record.directory / "checkpoints", lambda text: self._warn(display, text))
        told = self.ranks.tell(found and str(found))
        return Path(told) if told else None

    def _within_budget(
        self, settings: Settings, display: Display, state: Mapping[str, Any] | None
    ) -> tuple[Settings, Fitted | None]:
        """The settings with the density that `optimizer.fit_gib` leaves, and the choice where this start makes it."""
        if getattr(settings.optimizer, "fit_gib", None) is None:
            return settings, None
        from adafrugal.memory import breakdown, fit

        if state is not None:
            return fit.beginning_with(settings, state["account"]["fitted_density"]), None
        found = fit.fitted(self._of_one_process(settings))
        display.say(breakdown.chosen(settings, found))
        return fit.beginning_with(settings, found.density), found

    def _describe(self, place: Place, task: Task, loop: Loop) -> None:
        """Record what this start of the run runs on, and set its status to running."""
        from adafrugal.tracking import environment

        here = {"device": place.name(), "precision": place.precision} | loop.compilation.decided(loop.settings)
        if self.ranks.size > 1:
            here |= {"processes": self.ranks.size, "parallel": self.settings.trainer.parallel}
        found = environment.describe() | here | {"data": task.data}
        found["identity"] = asdict(self.identity) | {"differs": differing(self.settings)}
        del found["identity"]["directory"]
        self.record.write_config(self._config())
        self.record.write_environment(found)
        self.record.add_event("start", step=loop.account.step, code=found["code"], **here)
        self.record.set_status("running")

    @contextmanager
    def _copied(self, display: Display) -> Iterator[None]:
        """Have a copy made at W&B, if there is to be one; however the run ends, the copy is closed."""
        if self.settings.tracking.kind != "wandb" or not self.ranks.first:
            yield
            return
        from adafrugal.tracking.wandb import WandbCopy

        def warn(text: str) -> None:
            self._warn(display, text)

        copy = WandbCopy(self.settings.tracking, self.record, self.identity.key, self.identity.labels, warn)
        try:
            yield
        except Exception:  # a process that is stopped at once does not wait for W&B
            copy.finish(1)
            raise
        copy.finish(0 if self.record.summary() else 1)

    def _warn(self, display: Display, text: str) -> None:
        """Put what went wrong and did not end the run into the record, where there is room, and before a person."""
        with suppress(OSError):
            self.record.add_event("warning", text=text)
        display.warn(hidden(text))


def _unless_at_once(end: Callable[[], None]) -> Callable[..., None]:
    """What ends something, as an exit of a context; a process that is stopped at once waits for nothing."""

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or issubclass(kind, Exception):
            end()

    return close


def _refuse_another(state: Mapping[str, Any], ours: Mapping[str, Any], record: Record) -> None:
    """A directory is named by its settings, but it can be renamed, or copied over another."""
    if "settings" not in state:
        raise TrainingError(
            "the checkpoint was written by another version of this code: continue with that version, or remove the "
            "run's directory to begin anew"
        )
    theirs = still_part(state["settings"])
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if names:
        listed = ", ".join(f"{name} ({theirs.get(name, 'default')}; now {ours.get(name, 'default')})" for name in names)
        raise SettingError(
            f"the checkpoint in {record.directory} is of a run with other settings: {listed}; remove that directory, "
            "or set another run_root"
        )


def _explained(error: Exception, settings: Settings, record: Record) -> str | None:
    """What to do about an error that no setting and no line of this code is the cause of; None for all others."""
    if isinstance(error, SettingError | TrainingError):  # which say it themselves
        return None
    if isinstance(error, OSError) and error.errno in _DISK:
        place = error.filename or record.directory
        return f"{place}: {error.strerror}; what is whole stays, and the same command goes on from the last checkpoint"
    from adafrugal.memory import out_of_memory

    return out_of_memory.reason(error, settings)


def _task_class(settings: Settings) -> Callable[..., Task]:
    if settings.task.kind == "pretrain":
        from adafrugal.training.tasks.pretrain import Pretrain

        return Pretrain
    from adafrugal.training.tasks.finetune import Finetune

    return Finetune
