"""The record of a run: a self-contained directory of plain files. W&B gets a copy.

    config.yaml        the settings
    status.json        {"status": created | running | interrupted | failed | finished, …}
    metrics.jsonl      one JSON object per line, each with `step`: a window of training steps, and the evaluation at
                       its end, if any
    events.jsonl       one JSON object per line: start (of a process), refresh, shrink, interval, checkpoint, nonfinite
                       (a loss), warning
    summary.json       the results of a finished run
    environment.json   versions, machine, code, data
    checkpoints/       to continue from, and the final model

This module imports no torch, since reports use it to read records. It hides secrets in all JSON that it writes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adafrugal.system.errors import RunError
from adafrugal.system.files import to_disk
from adafrugal.system.secrets import hidden

_LINES = ("metrics.jsonl", "events.jsonl")
STATUSES = ("created", "running", "interrupted", "failed", "finished")
FILES = ("config.yaml", "environment.json", "events.jsonl", "metrics.jsonl", "status.json", "summary.json")


class Record:
    """One run's directory. `begin` creates it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str | None:
        """created, running, interrupted, failed or finished; None if there is no run yet."""
        found = self._json("status.json")
        return found["status"] if found else None

    @property
    def begun(self) -> str | None:
        """When the run started first; None if it has no events, as one that was fetched from W&B."""
        first = (self._bytes("events.jsonl") or b"").partition(b"\n")[0]
        return _read(self.directory / "events.jsonl", first).get("time") if first else None

    @property
    def reason(self) -> str:
        """Why the run failed; empty if it did not."""
        return str((self._json("status.json") or {}).get("reason", ""))

    def config(self) -> dict[str, Any]:
        """Read the composed and checked settings."""
        return OmegaConf.to_container(OmegaConf.create((self._bytes("config.yaml") or b"").decode()))

    def summary(self) -> dict[str, Any] | None:
        """Read the results; None for an unfinished run."""
        return self._json("summary.json")

    def environment(self) -> dict[str, Any] | None:
        """Read the versions, machine, code and data of the run's latest start."""
        return self._json("environment.json")

    def metrics(self) -> list[dict[str, Any]]:
        """Read the complete lines of metrics.jsonl."""
        return self.metrics_from(0)[0]

    def metrics_from(self, offset: int, damage: list[str] | None = None) -> tuple[list[dict[str, Any]], int]:
        """Read the complete lines of metrics.jsonl from a byte offset on; return them and the offset after them.

        Damaged lines are errors, or where there is a list for them, left out and named in it.
        """
        return self._lines("metrics.jsonl", offset, damage)

    def events(self) -> list[dict[str, Any]]:
        """Read the complete lines of events.jsonl."""
        return self._lines("events.jsonl")[0]

    def _bytes(self, name: str, offset: int = 0) -> bytes | None:
        with suppress(FileNotFoundError), (self.directory / name).open("rb") as opened:
            opened.seek(offset)
            return opened.read()
        return None

    def _json(self, name: str) -> dict[str, Any] | None:
        found = self._bytes(name)
        return None if found is None else _read(self.directory / name, found)

    def _lines(
        self, name: str, offset: int = 0, damage: list[str] | None = None
    ) -> tuple[list[dict[str, Any]], int]:
        text, found = self._bytes(name, offset) or b"", []
        whole, end, _torn = text.rpartition(b"\n")  # a killed process may leave an incomplete line
        for line in whole.splitlines():
            try:
                found.append(_read(self.directory / name, line))
            except RunError as error:
                if damage is None:
                    raise
                damage.append(str(error))
        return found, offset + len(whole + end)

    # -- writing --------------------------------------------------------------------------------------------------

    def begin(self, config: Mapping[str, Any]) -> None:
        """Create the directory and write the settings; an existing run keeps its settings and status.

        Cut off incomplete lines that a killed process left, so that no line is appended to them.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in self._line_files():
            whole, end, _torn = file.read_bytes().rpartition(b"\n")
            os.truncate(file, len(whole + end))
        if self.status is None:
            self.write_config(config)
            self.set_status("created")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the settings of this start; some may differ between a run's starts."""
        self._write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))

    def set_status(self, status: str, **more: Any) -> None:
        """Write the status; on a full disk, overwrite the old file in place."""
        text = _json_of({"status": status, "time": _now(), **more}, indent=2)
        try:
            self._write("status.json", text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (self.directory / "status.json").exists():
                raise
            with (self.directory / "status.json").open("r+") as file:
                file.write(text)
                file.truncate()

    def write_environment(self, found: Mapping[str, Any]) -> None:
        """Write versions, machine, code and data."""
        self._write("environment.json", _json_of(found, indent=2))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results."""
        self._write("summary.json", _json_of(summary, indent=2))

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append a line, which has `step`, to metrics.jsonl."""
        self._append("metrics.jsonl", line)

    def write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl."""
        self._write("metrics.jsonl", "".join(map(_json_of, lines)))

    def add_event(self, event: str, **more: Any) -> None:
        """Append a line to events.jsonl."""
        self._append("events.jsonl", {"event": event, "time": _now(), **more})

    def to_disk(self) -> None:
        """Flush the appended lines to disk."""
        for file in self._line_files():
            to_disk(file)

    def go_back_to(self, step: int) -> None:
        """Drop metrics and training events of later steps, since a resumed run writes them again.

        Also drop a damaged end that a power cut left after the lines of `step`.

        Raises:
            RunError: a damaged line precedes one that has to stay.
        """
        for file in self._line_files():
            kept, damage = [], None
            for text in file.read_bytes().splitlines():
                try:
                    line = _read(file, text)
                except RunError as error:
                    damage = damage or error
                    continue
                is_early, event = line.get("step", 0) <= step, line.get("event")
                if damage is None and (is_early or event in ("start", "checkpoint", "warning")):
                    kept.append(line)
                elif damage is not None and is_early and "step" in line and event not in ("start", "checkpoint"):
                    raise damage
            self._write(file.name, "".join(map(_json_of, kept)))

    def _line_files(self) -> list[Path]:
        return [file for name in _LINES if (file := self.directory / name).exists()]

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.directory / name).open("ab", buffering=0) as file:
            size, left = file.tell(), _json_of(line).encode()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:  # a full disk may have stored a part
                file.truncate(size)
                raise

    def _write(self, name: str, text: str) -> None:
        """Replace a file atomically and durably."""
        beside = self.directory / f".{name}.new"
        try:
            with beside.open("w") as file:
                file.write(text)
                to_disk(file)
            beside.replace(self.directory / name)
            to_disk(self.directory)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


class Unwritten(Record):
    """The record in a run's processes other than rank 0: it can be read, and writes nothing."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Write nothing."""

    begin = set_status = to_disk = go_back_to = _append = _write = _nothing


def spoken(name: str) -> str:
    """Return the name of an evaluation's result, `validation_…`, for people."""
    return name.removeprefix("validation_").replace("_", " ")


def _read(file: Path, text: bytes) -> dict[str, Any]:
    try:
        return json.loads(text, object_hook=_numbers)
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}); remove the run's directory to begin anew") from error


def _json_of(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent) + "\n"


def _plain(value: Any) -> Any:
    """Convert infinities and NaN, which JSON lacks, to strings; hide secrets."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return hidden(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `_plain`: "nan", "inf" and "-inf" to floats."""
    return {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in found.items()}


_TIME = "%Y-%m-%dT%H:%M:%S%z"


def _now() -> str:
    return time.strftime(_TIME)


def read_time(text: str) -> float:
    """Return the seconds since 1970 of a `time` in a record."""
    return datetime.strptime(text, _TIME).timestamp()
