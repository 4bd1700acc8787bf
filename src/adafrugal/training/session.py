"""From settings to a record: start, continue or recognise a run."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafrugal.config import SettingError, Settings
from adafrugal.tracking.record import Record
from adafrugal.training.identity import Identity, differing, identify
from adafrugal.training.signals import Stop

if TYPE_CHECKING:
    from adafrugal.tracking.wandb import WandbCopy
    from adafrugal.training.devices import Place
    from adafrugal.training.display import Display
    from adafrugal.training.loop import Loop
    from adafrugal.training.pretrain import Pretrain


def run(settings: Settings, choices: Mapping[str, str]) -> tuple[Record, bool]:
    """Make the run that these settings describe, or what is missing of it.

    Returns:
        The record, and whether the run is finished; if not, it was interrupted and can be continued.

    Raises:
        SettingError: a missing input, or data that are not those the run began with.
        TrainingError: the run failed.
    """
    identity = identify(settings, choices)
    record = Record(identity.directory)
    if record.status == "finished":
        return record, True
    with Stop() as stop:  # from here on, since an interruption in the middle of somebody's import can get lost
        return record, _make(settings, identity, record, stop)


def _make(settings: Settings, identity: Identity, record: Record, stop: Stop) -> bool:
    """Begin or continue the run as the only process that writes it."""
    from adafrugal.training import checkpoint, devices

    saved = checkpoint.latest(record.directory / "checkpoints")
    state = checkpoint.load_state(saved) if saved else None
    place = devices.place(settings.trainer, state["precision"] if state else None)
    with _only_writer(settings, identity.directory):
        if record.status == "finished":  # by a process that held the directory until now
            return True
        # where the record lies is no part of it: it may be moved, published, or sent to W&B
        record.begin({k: v for k, v in asdict(settings).items() if k not in ("run_root", "cache_root")})
        return _train(settings, identity, record, stop, place, saved, state)


@contextmanager
def _only_writer(settings: Settings, directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        reason = f"{error.strerror}; choose a directory that can be written to"
        raise SettingError(f"run_root is {settings.run_root}: {reason}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingError(f"{directory} is being written by another process; wait for it or change arm") from error
        yield


def _train(
    settings: Settings, identity: Identity, record: Record, stop: Stop, place: Place, saved: Path | None, state: Any
) -> bool:
    """Train to the end, or until asked to stop; whatever happens, the record's status says it."""
    from adafrugal.training.display import Display

    with Display(settings.trainer.steps) as display:
        try:
            with _copy(settings, identity, record, display) as make_copy:
                loop = _set_up(settings, identity, record, display, place, saved, state, make_copy)
                finished = loop.fit(stop)
                if finished:
                    summary = loop.summary()
                    record.write_summary(summary)
                    if loop.copy is not None:
                        loop.copy.write_summary(summary)
        except (KeyboardInterrupt, SystemExit):  # a second signal, or nobody left to print to
            record.set_status("interrupted")
            raise
        except Exception as error:
            record.set_status("failed", reason=f"{type(error).__name__}: {error}")
            raise
        record.set_status("finished" if finished else "interrupted", step=loop.account.step)
        if not finished:
            display.say(f"interrupted after step {loop.account.step}; the same command continues the run")
        return finished


def _set_up(
    settings: Settings,
    identity: Identity,
    record: Record,
    display: Display,
    place: Place,
    saved: Path | None,
    state: dict[str, Any] | None,
    make_copy: Callable[[], WandbCopy | None],
) -> Loop:
    """Build everything, say what it is, and go to where the run stands."""
    import torch

    from adafrugal.optim import split_parameters
    from adafrugal.training import checkpoint, optimizers
    from adafrugal.training.loop import Loop
    from adafrugal.training.pretrain import Pretrain
    from adafrugal.training.schedule import factor

    task = Pretrain(settings, place, display.say)
    groups = split_parameters(task.model)
    optimizer = optimizers.build(settings, groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(settings.schedule, settings.trainer.steps))
    display.say(f"{identity.key} → {record.directory}\n\n{groups}\n")
    if state is not None:
        _refuse_other_data(state["data"], task, record)
        checkpoint.load_model(saved, task.model)
        display.say(f"continuing after step {state['account']['step']}")
    step = state["account"]["step"] if state else 0
    record.go_back_to(step)
    _describe(settings, identity, record, place, task, step)
    loop = Loop(settings, task, optimizer, scheduler, place, record, make_copy(), display)
    if state is not None:
        loop.resume(state)
    return loop


def _describe(
    settings: Settings, identity: Identity, record: Record, place: Place, task: Pretrain, step: int
) -> None:
    """Note what this start of the run runs on, and that it runs."""
    from adafrugal.tracking import environment

    here = {"device": place.name(), "precision": place.precision}
    found = environment.describe() | here | {"data": task.data}
    found["identity"] = {"key": identity.key, "labels": identity.labels, "differs": differing(settings)}
    record.write_environment(found)
    record.add_event("start", step=step, code=found["code"], **here)
    record.set_status("running")


@contextmanager
def _copy(
    settings: Settings, identity: Identity, record: Record, display: Display
) -> Iterator[Callable[[], WandbCopy | None]]:
    """A function that opens the copy at W&B, if there is to be one; however the run ends, the copy is closed."""
    opened: list[WandbCopy] = []

    def warn(text: str) -> None:
        record.add_event("warning", text=text)
        display.warn(text)

    def open_copy() -> WandbCopy | None:
        if settings.tracking.kind != "wandb":
            return None
        from adafrugal.tracking.wandb import WandbCopy

        opened.append(WandbCopy(settings.tracking, record, identity.key, identity.labels, warn))
        return opened[0]

    exit_code = 1
    try:
        yield open_copy
        exit_code = 0 if record.summary() else 1
    finally:
        for copy in opened:
            copy.finish(exit_code)


def _refuse_other_data(before: str, task: Pretrain, record: Record) -> None:
    now = task.data["fingerprint"]
    if now != before:
        raise SettingError(
            f"the run in {record.directory} was begun on other data (fingerprint {before[:12]}, now {now[:12]}): "
            "install the package versions of its environment.json, or remove the directory to begin anew"
        )
