"""Copy a run's record to Weights & Biases, and fetch records from there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from adafrugal.settings.naming import run_name
from adafrugal.settings.schema import WandbTracking, is_plain_name
from adafrugal.system.errors import SettingError, line
from adafrugal.tracking.copying import SECONDS, Source, flat, work
from adafrugal.tracking.record import Record

_WANDB_SECONDS = SECONDS - 10  # limit of W&B's own start and end; leaves time to report its error


def main(pipe: Connection) -> None:
    """Copy a record in the helper process."""
    work(pipe, _copy)


def _copy(given: Mapping[str, Any], source: Source) -> None:
    """Send the record as a W&B run.

    Each start of a run is a W&B run of its own: W&B cannot continue offline runs, and two processes that write to one
    id overwrite each other.
    """
    import wandb

    settings, record, labels = WandbTracking(**given), source.record, source.labels
    if settings.mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("there is no login: type `wandb login`, or set tracking.mode=offline")
    for earlier in record.directory.glob("wandb/offline-run-*"):  # this copy has what it has, up to the checkpoint
        earlier.rename(earlier.with_name(f"earlier-{earlier.name}"))
    limits = {"init_timeout": _WANDB_SECONDS, "finish_timeout": _WANDB_SECONDS, "finish_timeout_raises": True}
    training = os.getppid()  # W&B's charts show this process's memory and processor
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=settings.mode,
        dir=str(record.directory),
        id=source.identity,
        group=settings.group or _group(labels),
        name=settings.name or run_name(labels["arm"], labels["seed"], ()),
        tags=[*settings.tags, *(f"{key}:{value}"[:64] for key, value in labels.items())],
        config=record.config() | {"environment": record.environment()},
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_stats_pid=training, **limits),
    )
    run.define_metric(settings.x_axis)
    run.define_metric("*", step_metric=settings.x_axis)
    for lines in source.lines():
        for metrics in lines:
            run.log(flat(metrics), step=metrics["step"])
    run.summary.update(flat(record.summary() or {}))
    run.finish(exit_code=source.code)


def _group(labels: Mapping[str, Any]) -> str:
    return "-".join(str(labels[key]) for key in ("task", "data", "model"))


def fetch(project: str, directory: Path) -> list[Record]:
    """Make records of a W&B project's finished runs. They have no events, which W&B does not get.

    Args:
        project: entity/project.
        directory: of the records; a finished one is not fetched again.

    Raises:
        SettingError: W&B refuses, cannot be reached, or has a run whose name is not plain.
    """
    import wandb

    try:
        runs = [run for run in wandb.Api().runs(project) if run.state == "finished"]
        ours = [run for run in runs if "environment" in run.config and "steps" in run.summary]
    except Exception as error:  # W&B raises errors of many classes
        login = "log in with `wandb login`, and give entity/project as it stands in its address"
        raise SettingError(f"W&B does not give the runs of {project}: {line(error)}; {login}") from error
    return [_fetched(run, directory) for run in ours]


def _fetched(run: Any, directory: Path) -> Record:
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    environment = config.pop("environment")
    identity = environment["identity"]
    names = (_group(identity["labels"]), identity["key"])
    for name in names:
        if not is_plain_name(name):
            raise SettingError(f"a run of this W&B project is called {name!r}, which is no plain name; not fetched")
    record = Record(directory.joinpath(*names))
    if record.status != "finished":
        record.begin(config)
        record.write_environment(environment)
        rows = [_nested(row) for row in run.scan_history() if row.get("step") is not None]
        record.write_metrics(sorted(rows, key=lambda row: row["step"]))
        record.write_summary(_nested(dict(run.summary.items())))
        record.set_status("finished")
    return record


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flat`; drops the names that W&B adds, which begin with _.

    W&B adds the last line of metrics to its summary. If that has a number `state_bytes` and ours a group of the same
    name, as in `state_bytes/end`, the group wins, since it is sorted after the number.
    """
    nested: dict[str, Any] = {}
    for name, value in sorted(flat.items()):
        if name.startswith("_") or value is None:
            continue
        *path, last = name.split("/")
        place = nested
        for part in path:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
    return nested
