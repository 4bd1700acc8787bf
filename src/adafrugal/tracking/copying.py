"""Copy a run's record elsewhere while it grows, in a process of its own. If copying fails, the run warns once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from adafrugal.settings.schema import TensorboardTracking, WandbTracking
from adafrugal.system.errors import line
from adafrugal.system.processes import Helper, end_with_parent
from adafrugal.tracking.record import Record

SECONDS = 30  # that a run waits for its copy at its end
_POLL = 1.0  # seconds between reads of the record
_KINDS = {  # of tracking -> the module whose process copies, and a name for people
    "wandb": ("adafrugal.tracking.wandb", "W&B"),
    "tensorboard": ("adafrugal.tracking.tensorboard", "TensorBoard"),
}


class Copy:
    """A process that copies the growing record to W&B or for TensorBoard, so that neither can disturb the run.

    Each start of a run begins a new copy with all metrics so far.

    Args:
        settings: of the tracking, which say where to.
        record: to copy; the copy's files go into its directory.
        identity: of the run.
        labels: task, data, model, arm and seed.
        warn: called at most once, with one sentence, if the copy fails; possibly from a thread.
    """

    def __init__(
        self,
        settings: WandbTracking | TensorboardTracking,
        record: Record,
        identity: str,
        labels: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn: Callable[[str], None] | None = warn
        self._helper: Helper | None = None
        module, self._where = _KINDS[settings.kind]
        try:
            self._helper = Helper(module, quiet=True)
        except OSError as error:  # no memory for another process
            self._say(error.strerror)
            return
        starts = sum(event["event"] == "start" for event in record.events())
        sent = (asdict(settings), str(record.directory.absolute()), f"{identity}-{starts}", dict(labels))
        with suppress(OSError):  # the process has ended; `finish` reports that
            self._helper.pipe.send(sent)
        self._listener = threading.Thread(target=self._listen, daemon=True, name=self._where)
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
            warn(f"{self._where} gets no copy of this run ({reason}); the record is complete without it")


class Source:
    """The record to copy, in the helper process.

    Attributes:
        identity: of this start of the run.
        code: the run's exit code, once it has ended.
    """

    def __init__(self, directory: Path, identity: str, labels: Mapping[str, Any], pipe: Connection) -> None:
        self.record, self.identity, self.labels, self._pipe = Record(directory), identity, labels, pipe
        self.code: int | None = None

    def lines(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the lines of metrics so far, then the new ones about every second, until the run has ended."""
        offset = 0
        while self.code is None:
            try:
                self.code = self._pipe.recv() if self._pipe.poll(_POLL) else None
            except (EOFError, OSError):  # the run was killed
                self.code = 1
            lines, offset = self.record.metrics_from(offset)
            yield lines


def work(pipe: Connection, copy: Callable[[Mapping[str, Any], Source], None]) -> None:
    """Call `copy` with the settings and the source until the run sends its exit code or is gone."""
    end_with_parent(grace=SECONDS)
    settings, directory, identity, labels = pipe.recv()
    try:
        copy(settings, Source(Path(directory), identity, labels, pipe))
    except Exception as error:  # W&B raises errors of many classes
        with suppress(OSError):
            pipe.send(line(error))
        os._exit(0)  # a normal exit would wait for W&B again


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values; join their names by slashes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
