"""The record of a run: a directory of plain files, complete in itself. This is the truth; W&B has a copy.

    config.yaml        the settings
    status.json        {"status": created | running | interrupted | failed | finished, …}
    metrics.jsonl      one JSON object a line, each with `step`: a window of training steps, with the evaluation
                       that ended it where there was one
    events.jsonl       one JSON object a line: start (of a process), refresh, shrink, interval, checkpoint, nonfinite (a
                       loss), warning
    summary.json       the end of the run in numbers; there when it is finished
    environment.json   versions, machine, code, data
    checkpoints/       what a run continues from, and the final model

Writing and reading both live here, and nothing here needs torch, so that reports read what runs wrote.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adafrugal.system.errors import SettingError
from adafrugal.system.secrets import hidden

LINES = ("metrics.jsonl", "events.jsonl")
FILES = ("config.yaml", "environment.json", "events.jsonl", "metrics.jsonl", "status.json", "summary.json")
STATUSES = ("created", "running", "interrupted", "failed", "finished")


class Record:
    """One run's directory. Made when it is first written to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str | None:
        """One of `STATUSES`; None where there is no run yet."""
        found = self._json("status.json")
        return found["status"] if found else None

    @property
    def reason(self) -> str:
        """Why it failed, if it did."""
        return str((self._json("status.json") or {}).get("reason", ""))

    def config(self) -> dict[str, Any]:
        """The settings, as they were composed and checked."""
        return OmegaConf.to_container(OmegaConf.create((self._bytes("config.yaml") or b"").decode()))

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run."""
        return self._json("summary.json")

    def environment(self) -> dict[str, Any] | None:
        """Versions, machine, code and data of the run's latest start."""
        return self._json("environment.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return self._lines("metrics.jsonl")

    def metrics_from(self, place: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of metrics.jsonl from a place in it on (in bytes), and the place behind them."""
        file = self.directory / "metrics.jsonl"
        if not file.exists():
            return [], place
        with file.open("rb") as opened:
            opened.seek(place)
            whole, end, _torn = opened.read().rpartition(b"\n")
        return [_read(file, line) for line in whole.splitlines()], place + len(whole + end)

    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl."""
        return self._lines("events.jsonl")

    def _bytes(self, name: str) -> bytes | None:
        file = self.directory / name
        return file.read_bytes() if file.exists() else None

    def _json(self, name: str) -> dict[str, Any] | None:
        found = self._bytes(name)
        return None if found is None else _read(self.directory / name, found)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        whole, _, _torn = (self._bytes(name) or b"").rpartition(b"\n")  # a killed process may leave half a line
        return [_read(self.directory / name, line) for line in whole.splitlines()]

    # -- writing --------------------------------------------------------------------------------------------------

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the directory and note the settings; a run that is there already keeps its own, and its status.

        Half a line that a killed process left is cut off, since what is appended next would stand on it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in LINES:
            if (self.directory / name).exists():
                whole, end, _ = (self.directory / name).read_bytes().rpartition(b"\n")
                os.truncate(self.directory / name, len(whole + end))
        if self.status is None:
            self.write_config(config)
            self.set_status("created")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Note the settings of this start, some of which make no other run of it."""
        self._write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))

    def set_status(self, status: str, **more: Any) -> None:
        """Note where the run stands, on a full disk, too: there the old note is written over."""
        value = {"status": status, "time": _now(), **more}
        try:
            self._write_json("status.json", value)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (self.directory / "status.json").exists():
                raise
            with (self.directory / "status.json").open("r+") as file:
                file.write(_json_of(value))
                file.truncate()

    def write_environment(self, found: Mapping[str, Any]) -> None:
        """Note versions, machine, code and data."""
        self._write_json("environment.json", found)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Note the end of the run in numbers."""
        self._write_json("summary.json", summary)

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append a line, with `step` in it, to metrics.jsonl."""
        self._append("metrics.jsonl", line)

    def write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """All of metrics.jsonl at once."""
        self._write("metrics.jsonl", "".join(json.dumps(_plain(line)) + "\n" for line in lines))

    def add_event(self, event: str, **more: Any) -> None:
        """Append a line to events.jsonl."""
        self._append("events.jsonl", {"event": event, "time": _now(), **more})

    def to_disk(self) -> None:
        """Wait until what was added would survive a power cut."""
        for name in LINES:
            if (self.directory / name).exists():
                to_disk(self.directory / name)

    def go_back_to(self, step: int) -> None:
        """Drop the metrics of later steps, and what the training did in them: a resumed run will write them again.

        What a power cut left unreadable behind all that a checkpoint stands on is dropped, too.

        Raises:
            SettingError: something before that is damaged.
        """
        for name in LINES:
            kept = [
                line
                for line in self._before_a_damaged_end(name, step)
                if line.get("step", 0) <= step or line.get("event") in ("start", "checkpoint", "warning")
            ]
            self._write(name, "".join(json.dumps(_plain(line)) + "\n" for line in kept))

    def _before_a_damaged_end(self, name: str, step: int) -> list[dict[str, Any]]:
        """The lines up to one that cannot be read, behind which none may be of a step that stays."""
        file, found, damage = self.directory / name, [], None
        for text in file.read_bytes().splitlines() if file.exists() else ():
            try:
                line = _read(file, text)
            except SettingError as error:
                damage = damage or error
                continue
            if damage is None:
                found.append(line)
            elif line.get("step", step + 1) <= step and line.get("event") not in ("start", "checkpoint"):
                raise damage
        return found

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.directory / name).open("ab", buffering=0) as file:
            size = file.tell()
            try:
                _write_all(file, json.dumps(_plain(line)).encode() + b"\n")
            except OSError:  # a full disk takes a part of it
                file.truncate(size)
                raise

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._write(name, _json_of(value))

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all: a reader never sees half a file."""
        beside = self.directory / f".{name}.new"
        try:
            with beside.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.directory / name)
            to_disk(self.directory)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


class Unwritten(Record):
    """A run's record for those of its processes that leave the writing to another."""

    def begin(self, config: Mapping[str, Any]) -> None:
        """Leave the directory as it is."""

    def set_status(self, status: str, **more: Any) -> None:
        """Note nothing."""

    def to_disk(self) -> None:
        """Nothing is written that could be lost."""

    def go_back_to(self, step: int) -> None:
        """Leave the lines as they are."""

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append nothing."""

    def _write(self, name: str, text: str) -> None:
        """Write nothing."""


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a directory's names, would survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _read(file: Path, text: bytes) -> dict[str, Any]:
    try:
        return json.loads(text, object_hook=_numbers)
    except ValueError as error:
        raise SettingError(f"{file} is damaged ({error}); remove the run's directory, and make it anew") from error


def spoken(name: str) -> str:
    """A number of an evaluation, `validation_…`, as people call it."""
    return name.removeprefix("validation_").replace("_", " ")


def _write_all(file: RawIOBase, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _json_of(value: Mapping[str, Any]) -> str:
    return json.dumps(_plain(value), indent=2) + "\n"


def _plain(value: Any) -> Any:
    """As JSON can have it: infinity and NaN are strings. What an error's text may quote, a key, is hidden."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return hidden(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """The other way round."""
    return {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in found.items()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
