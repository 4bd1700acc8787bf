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

if TYPE_CHECKING:
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
    try:
        identity.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}; choose a directory that can be written to"
        raise SettingError(f"run_root is {settings.run_root}: {reason}") from error
    with _only_writer(identity.directory):
        if record.status is None:
            # where the record lies is not part of it: it may be moved, published, or sent to W&B
            record.create({k: v for k, v in asdict(settings).items() if k not in ("run_root", "cache_root")})
        return record, _train(settings, identity, record)


@contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingError(f"{directory} is being written by another process; wait for it or change arm") from error
        yield


def _train(settings: Settings, identity: Identity, record: Record) -> bool:
    from adafrugal.training.display import Display
    from adafrugal.training.signals import Stop

    with Display(settings.trainer.steps) as display, Stop() as stop:
        try:
            loop = _set_up(settings, identity, record, display)
            finished = loop.fit(stop)
        except KeyboardInterrupt:
            record.set_status("interrupted")
            return False
        except SettingError as error:
            record.set_status("failed", reason=str(error))
            raise
        except Exception as error:
            record.set_status("failed", reason=f"{type(error).__name__}: {error}")
            raise
        if finished:
            summary = summarise(loop)
            record.write_summary(summary)
            if loop.copy is not None:
                loop.copy.write_summary(summary)
        record.set_status("finished" if finished else "interrupted", step=loop.progress.step)
        if loop.copy is not None:
            loop.copy.finish(0 if finished else 1)
        if not finished:
            display.say(f"interrupted after step {loop.progress.step}; the same command continues the run")
        return finished


def _set_up(settings: Settings, identity: Identity, record: Record, display: Display) -> Loop:
    """Build everything, say what it is, and go to where the run stands."""
    import torch

    from adafrugal.optim import split_parameters
    from adafrugal.tracking import environment
    from adafrugal.tracking.wandb import WandbCopy
    from adafrugal.training import checkpoint, optimizers
    from adafrugal.training.devices import place
    from adafrugal.training.loop import Loop
    from adafrugal.training.pretrain import Pretrain
    from adafrugal.training.schedule import factor

    where = place(settings.trainer)
    task = Pretrain(settings, where, display.say)
    groups = split_parameters(task.model)
    optimizer = optimizers.build(settings, groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(settings.schedule, settings.trainer.steps))
    display.say(f"{identity.key} → {record.directory}\n\n{groups}\n")

    saved = checkpoint.latest(record.directory / "checkpoints")
    state = None
    if saved is not None:
        state = checkpoint.load(saved, task.model)
        _refuse_other_data(state["data"], task, record)
        record.go_back_to(state["progress"]["step"])
        display.say(f"continuing after step {state['progress']['step']}")
    else:
        record.go_back_to(0)
    device = torch.cuda.get_device_name() if where.device.type == "cuda" else "cpu"
    found = environment.describe() | {"device": device, "precision": where.precision, "data": task.data}
    found["identity"] = {"key": identity.key, "labels": identity.labels, "differs": differing(settings)}
    record.write_environment(found)
    record.add_event("start", step=state["progress"]["step"] if state else 0, code=found["code"])
    record.set_status("running")
    copy = None
    if settings.tracking.kind == "wandb":
        copy = WandbCopy(settings.tracking, record, identity.key, identity.labels, _warner(record, display))
    loop = Loop(settings, task, optimizer, scheduler, where, record, copy, display)
    if state is not None:
        loop.resume(state)
    return loop


def _warner(record: Record, display: Display) -> Callable[[str], None]:
    def warn(text: str) -> None:
        record.add_event("warning", text=text)
        display.warn(text)

    return warn


def _refuse_other_data(before: str, task: Pretrain, record: Record) -> None:
    now = task.data["fingerprint"]
    if now != before:
        raise SettingError(
            f"the run in {record.directory} was begun on other data (fingerprint {before[:12]}, now {now[:12]}): "
            "install the package versions of its environment.json, or remove the directory to begin anew"
        )


def summarise(loop: Loop) -> dict[str, Any]:
    """The end of a run in numbers."""
    from adafrugal.memory.measure import adamw_state_bytes
    from adafrugal.optim import Frugal, state_bytes

    progress, optimizer, line = loop.progress, loop.optimizer, loop.last_line
    seconds = loop.seconds()
    counted = state_bytes(optimizer)
    lines = [m for m in loop.record.metrics() if "validation_loss" in m]
    best = min(lines, key=lambda m: m["validation_loss"])
    summary: dict[str, Any] = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "epochs": loop.task.epochs(progress.step),
        "loss": line["loss"],
        **{key: value for key, value in line.items() if key.startswith("validation_")},
        "best_validation_loss": {"step": best["step"], "value": best["validation_loss"]},
        "unigram": loop.task.yardstick(),
        "seconds": seconds | {"wall": progress.wall},
        "optimizer_share": (seconds["optimizer"] + seconds["refresh"]) / (seconds["forward"] + seconds["backward"]),
        "parameters": sum(p.numel() for p in loop.task.model.parameters()),
        "state_bytes": {
            "start": progress.state_bytes_start,
            "peak": progress.state_bytes_peak,
            "end": counted.total,
            "end_by_role": counted.by_role(),
            "adamw": adamw_state_bytes(list(loop.task.model.parameters())),
        },
        "memory": line["memory"] | {"peak_of_the_run": progress.memory_peak},
        "density": line["density"],
        "interval": line["interval"],
        "refreshes": progress.refreshes,
        "device": loop.place.device.type,
        "precision": loop.place.precision,
    }
    if isinstance(optimizer, Frugal):
        names = {n for g in optimizer.param_groups if g["split"] for n in g["param_names"]}
        moments = sum(counted[name].get("moments", 0) for name in names & counted.keys())
        summary["split_moments"] = {"bytes": moments, "selected_entries": optimizer.selected_entries()}
    return summary
