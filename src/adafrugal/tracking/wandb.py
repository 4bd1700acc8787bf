"""Copy a run's record to Weights & Biases, and fetch records from there. If copying fails, the run warns once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from adafrugal.settings.schema import WandbTracking, is_plain_name
from adafrugal.system.errors import SettingError, line
from adafrugal.system.processes import Helper, end_with_parent
from adafrugal.tracking.record import Record

SECONDS = 30  # that a run waits for W&B at its end
_WANDB_SECONDS = SECONDS - 10  # limit of W&B's own start and end; leaves time to report its error
_POLL = 1.0  # seconds between reads of the record


class WandbCopy:
    """A process that sends the growing record to W&B, so that W&B cannot disturb the run.

    Each start of a run is a separate W&B run that begins with all metrics so far: W&B cannot continue offline runs, and
    two processes that write to one id overwrite each other.

    Args:
        settings: mode, project and entity.
        record: to copy; W&B's files go into its directory.
        identity: of the run; the W&B id is this and the number of the start.
        labels: task, data, model, arm and seed, for W&B's group, name and tags.
        warn: called at most once, with one sentence, if the copy fails; possibly from a thread.
    """

    def __init__(
        self,
        settings: WandbTracking,
        record: Record,
        identity: str,
        labels: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn: Callable[[str], None] | None = warn
        self._helper: Helper | None = None
        try:
            self._helper = Helper(__name__, quiet=True)
        except OSError as error:  # no memory for another process
            self._say(error.strerror)
            return
        starts = sum(event["event"] == "start" for event in record.events())
        sent = (asdict(settings), str(record.directory.absolute()), f"{identity}-{starts}", dict(labels))
        with suppress(OSError):  # the process has ended; `finish` reports that
            self._helper.pipe.send(sent)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="W&B")
        self._listener.start()

    def finish(self, exit_code: int) -> None:
        """Wait up to `SECONDS` for the process to copy the rest; `exit_code` is 0 for a finished run."""
        if self._helper is None:
            return
        with suppress(OSError):  # the process has ended and said why
            self._helper.pipe.send(exit_code)
        ended = self._helper.end(SECONDS)
        self._listener.join(1)  # for the last message
        if ended != 0:
            late = f"it has not taken the rest within {SECONDS} seconds"
            self._say(late if ended is None else f"its process ended with {ended}")

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._say(self._helper.pipe.recv())

    def _say(self, reason: str) -> None:
        warn, self._warn = self._warn, None
        if warn:
            warn(f"W&B gets no copy of this run ({reason}); the record is complete without it")


def main(pipe: Connection) -> None:
    """Copy the record, in the helper process, until the run sends its exit code or is gone."""
    end_with_parent(grace=SECONDS)
    settings, directory, identity, labels = pipe.recv()
    try:
        _copy(WandbTracking(**settings), Record(Path(directory)), identity, labels, pipe)
    except Exception as error:  # W&B raises errors of many classes
        with suppress(OSError):
            pipe.send(line(error))
        os._exit(0)  # a normal exit would wait for W&B again


def _copy(settings: WandbTracking, record: Record, identity: str, labels: Mapping[str, Any], pipe: Connection) -> None:
    import wandb

    if settings.mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("there is no login: type `wandb login`, or set tracking.mode=offline")
    limits = {"init_timeout": _WANDB_SECONDS, "finish_timeout": _WANDB_SECONDS, "finish_timeout_raises": True}
    training = os.getppid()  # W&B's charts show this process's memory and processor
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=settings.mode,
        dir=str(record.directory),
        id=identity,
        group=_group(labels),
        name=f"{labels['arm']}-seed{labels['seed']}",
        tags=[f"{key}:{value}"[:64] for key, value in labels.items()],
        config=record.config() | {"environment": record.environment()},
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_stats_pid=training, **limits),
    )
    offset, code = 0, None
    while code is None:
        try:
            code = pipe.recv() if pipe.poll(_POLL) else None
        except (EOFError, OSError):  # the run was killed
            code = 1
        lines, offset = record.metrics_from(offset)
        for metrics in lines:
            run.log(_flat(metrics), step=metrics["step"])
    run.summary.update(_flat(record.summary() or {}))
    run.finish(exit_code=code)


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
    """Inverse of `_flat`; drops the names that W&B adds, which begin with _.

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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values; join their names by slashes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
