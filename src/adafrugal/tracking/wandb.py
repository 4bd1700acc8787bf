"""A copy of the record for Weights & Biases, for which no run fails (one warning is all), and the way back."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any

from adafrugal.settings.schema import WandbTracking, is_plain_name
from adafrugal.system.errors import SettingError
from adafrugal.system.signals import leave_to_the_parent
from adafrugal.tracking.record import Record

SECONDS = 30  # that a run waits for W&B, at its end
ITS_OWN = SECONDS - 10  # of these, that W&B has for its start and for its end, before it says itself what is wrong
_LOOKS_EVERY = 1.0  # seconds, for what is new in the record


class WandbCopy:
    """A process that reads the record as it grows and sends it to W&B: what W&B does, or does not, is no run's matter.

    Every start of a run makes a run at W&B of its own that begins with all metrics so far: offline runs cannot be
    continued at W&B, and two processes that write to one id overwrite each other.

    Args:
        settings: mode, project and entity.
        record: what is copied; W&B's own files go into its directory.
        identity: the run's identity; with the number of the start it is the id at W&B.
        labels: task, data, model, arm, seed: what tables select by. They become the group, the name and the tags.
        warn: told once, in a sentence and from a thread, when the copy has failed.
    """

    def __init__(
        self,
        settings: WandbTracking,
        record: Record,
        identity: str,
        labels: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn, self._warned = warn, False
        self._pipe, theirs = Pipe()
        starts = sum(event["event"] == "start" for event in record.events())
        code = "from adafrugal.tracking.wandb import main; main()"
        command = [sys.executable, "-P", "-c", code, str(theirs.fileno())]  # -P: modules of the user's are not ours
        quiet = {"stdin": DEVNULL, "stdout": DEVNULL, "stderr": DEVNULL}
        self._process: Popen[bytes] | None = None
        try:
            with theirs:  # closed here, so that the pipe ends when the process does
                self._process = Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, **quiet)
        except OSError as error:  # no memory for another process
            self._say(error.strerror)
        with suppress(OSError):  # it has ended already; `finish` says so
            self._pipe.send((asdict(settings), str(record.directory.absolute()), f"{identity}-{starts}", dict(labels)))
        self._listener = threading.Thread(target=self._listen, daemon=True, name="W&B")
        self._listener.start()

    def finish(self, exit_code: int) -> None:
        """Let the process copy the rest and end, which it has `SECONDS` for; 0 for a run that finished."""
        if self._process is None:
            return
        with suppress(OSError):  # it has ended already, and has told why
            self._pipe.send(exit_code)
        try:
            ended = self._process.wait(SECONDS)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()
            ended = f"it has not taken the rest within {SECONDS} seconds"
        self._listener.join(1)  # for what the process said last
        if ended != 0:
            self._say(ended if isinstance(ended, str) else f"its process ended with {ended}")

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._say(self._pipe.recv())

    def _say(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"W&B gets no copy of this run ({reason}); the record is complete without it")


def main() -> None:
    """The process; ends when it is told to, or nobody is left to tell it."""
    leave_to_the_parent()
    pipe = Connection(int(sys.argv[1]))
    threading.Thread(target=_watch, args=[os.getppid()], daemon=True, name="parent").start()
    settings, directory, identity, labels = pipe.recv()
    try:
        copy(WandbTracking(**settings), Record(Path(directory)), identity, labels, lambda: _end(pipe))
    except Exception as error:  # W&B raises all kinds
        with suppress(OSError):
            pipe.send(_sentence(error))
        os._exit(0)  # W&B would wait at the end for what has failed


def _watch(parent: int) -> None:
    """End this process some time after the one that started it, which cannot do so any more."""
    while os.getppid() == parent:
        time.sleep(_LOOKS_EVERY)
    time.sleep(SECONDS)
    os._exit(1)


def _end(pipe: Connection) -> int | None:
    """The run's exit code; None as long as it goes on."""
    if not pipe.poll(_LOOKS_EVERY):
        return None
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return 1


def copy(
    settings: WandbTracking, record: Record, identity: str, labels: Mapping[str, Any], end: Callable[[], int | None]
) -> None:
    """Send what the record holds, and what is added to it, nested names joined by slashes.

    All but one argument are those of `WandbCopy`, `identity` with the number of the start; `end` gives the run's exit
    code, None as long as it goes on, and is asked between two looks at the record.
    """
    run = _start(settings, record, identity, labels)
    place, code = 0, None
    while code is None:
        code = end()
        lines, place = record.metrics_from(place)
        for line in lines:
            run.log(_flat(line), step=line["step"])
    run.summary.update(_flat(record.summary() or {}))
    run.finish(exit_code=code)


def _start(settings: WandbTracking, record: Record, identity: str, labels: Mapping[str, Any]) -> Any:
    import wandb

    if settings.mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("there is no login: type `wandb login`, or set tracking.mode=offline")
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=settings.mode,
        dir=str(record.directory),
        id=identity,
        group="-".join(str(labels[key]) for key in ("task", "data", "model")),
        name=f"{labels['arm']}-seed{labels['seed']}",
        tags=[f"{key}:{value}"[:64] for key, value in labels.items()],
        config=record.config() | {"environment": record.environment()},
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=ITS_OWN,
            finish_timeout=ITS_OWN,
            finish_timeout_raises=True,
            x_stats_pid=os.getppid(),  # whose memory and processor W&B's charts show: the training's
        ),
    )


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fetch(project: str, directory: Path) -> list[Record]:
    """Records of the finished runs of a project at W&B, made from its copies of them; events are not copied.

    Args:
        project: as entity/project.
        directory: where the records are written; one that is there is not fetched again.

    Raises:
        SettingError: W&B refuses, or cannot be reached.
    """
    import wandb

    try:
        runs = list(wandb.Api().runs(project))
        ours = [
            run for run in runs if "environment" in run.config and "steps" in run.summary and run.state == "finished"
        ]
    except Exception as error:  # W&B raises all kinds
        login = "log in with `wandb login`, and give entity/project as it stands in its address"
        raise SettingError(f"W&B does not give the runs of {project}: {_sentence(error)}; {login}") from error
    return [_fetched(run, directory) for run in ours]


def _fetched(run: Any, directory: Path) -> Record:
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    environment = config.pop("environment")
    labels = environment["identity"]["labels"]
    group = "-".join(str(labels[key]) for key in ("task", "data", "model"))
    record = Record(directory / _name(group) / _name(environment["identity"]["key"]))
    if record.status != "finished":
        record.begin(config)
        record.write_environment(environment)
        rows = [_nested(row) for row in run.scan_history() if row.get("step") is not None]
        record.write_metrics(sorted(rows, key=lambda row: row["step"]))
        record.write_summary(_nested(dict(run.summary.items())))
        record.set_status("finished")
    return record


def _name(given: str) -> str:
    """A name from outside, which must be one of a directory here."""
    if not is_plain_name(given):
        raise SettingError(
            f"a run of this project at W&B calls itself {given!r}, which is no name of a run; not fetched"
        )
    return given


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `_flat` made flat, without what W&B adds under names that begin with _.

    W&B's summary has the last line of metrics in it, too, where `state_bytes` is a number and not a group of them: the
    group wins.
    """
    nested: dict[str, Any] = {}
    for name, value in sorted(flat.items()):  # state_bytes before state_bytes/end
        *path, last = name.split("/")
        if not name.startswith("_") and value is not None:
            place = nested
            for part in path:
                if not isinstance(place.get(part), dict):
                    place[part] = {}
                place = place[part]
            place[last] = value
    return nested


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
