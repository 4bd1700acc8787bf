"""Read the records of runs that go on: only what their files have gained since the last look."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adafrugal.settings.naming import shown
from adafrugal.settings.schema import TrainerSettings
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import STATUSES, Record

_POINTS = 120  # of a curve, at most twice as many
_PATIENCE = 60.0  # seconds after which a run may count as silent,
_WINDOWS = 10  # if it has not written for as many times the seconds of its last line
_TO_START = 600.0  # seconds without a line: text is prepared, or a model compiled
STRANGE = (SettingError, OSError, KeyError, TypeError, ValueError, AttributeError)  # a record may hold anything


class Curve:
    """Points (step, value) of a growing run, thinned evenly. The last one is always there."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, float]] = []
        self._last: tuple[int, float] | None = None
        self._seen, self._every = 0, 1

    def add(self, step: int, value: float | None) -> None:
        """Add a point; None, NaN and infinite values are left out."""
        if value is None or not math.isfinite(value):
            return
        self._last = (step, value)
        if self._seen % self._every == 0:
            self._kept.append(self._last)
        self._seen += 1
        if len(self._kept) == 2 * _POINTS:
            self._kept, self._every = self._kept[::2], 2 * self._every

    @property
    def points(self) -> list[tuple[int, float]]:
        """The points to draw."""
        return self._kept if self._last in (None, *self._kept[-1:]) else [*self._kept, self._last]


class Run:
    """One run as far as its record has been read.

    Attributes:
        group: the directory in which the run's lies, with the root's name.
        steps: that the run has to make; None if only its epochs are known.
        line: its last line of metrics.
        results: the last value of each number of an evaluation.
        seconds: since its start, without the time between its starts.
        sign: when it last wrote, in seconds since 1970.
        damage: why a part of its record cannot be read, by file.
        changes: counts the reads of its files.
    """

    def __init__(self, directory: Path, root: Path) -> None:
        self.record = Record(directory)
        self.group = directory.parent.relative_to(root.parent).as_posix()
        self.recorded, self.reason = "", ""
        self.labels: dict[str, Any] = {}
        self.differs: dict[str, Any] = {}
        self.steps: int | None = None
        self.damage: dict[str, str] = {}
        self.changes = 0
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._begin()

    def _begin(self) -> None:
        self.line: dict[str, Any] = {}
        self.results: dict[str, float] = {}
        self.loss, self.density, self.validation = Curve(), Curve(), Curve()
        self.seconds, self._offset = 0.0, 0
        self._damaged: list[str] = []  # lines that cannot be read

    def update(self) -> None:
        """Read the files that have changed."""
        readers = {"environment.json": self._identity, "status.json": self._status, "metrics.jsonl": self._lines}
        for name, read in readers.items():
            try:
                found = (self.record.directory / name).stat()
                before, stamp = self._stamps.get(name), (found.st_ino, found.st_size, found.st_mtime_ns)
                if stamp == before:
                    continue
                self._stamps[name] = stamp
                self.damage.pop(name, None)
                self.changes += 1
                if name == "metrics.jsonl" and before and (stamp[0] != before[0] or stamp[1] < before[1]):
                    self._begin()  # a resumed run went back to its checkpoint
                read()
            except FileNotFoundError:
                continue
            except STRANGE as error:
                self.damage[name] = f"{name}: {error}".replace(f"{name}: {self.record.directory}/", "")

    def _identity(self) -> None:
        identity = self.record.environment()["identity"]
        labels, differs = dict(identity["labels"]), dict(identity["differs"])
        steps = differs.get("trainer.steps", TrainerSettings.steps)
        self.labels, self.differs, self.steps = labels, differs, None if steps is None else int(steps)

    def _status(self) -> None:
        status = self.record.status
        if status not in STATUSES:
            raise ValueError(f"{status!r} is no status")
        self.recorded, self.reason = status, str(self.record.reason)

    def _lines(self) -> None:
        lines, self._offset = self.record.metrics_from(self._offset, self._damaged)
        for line in lines:
            try:
                self._take(line)
            except STRANGE as error:
                self._damaged.append(repr(error))
        if self._damaged:  # the lines after it are there
            raise ValueError(self._damaged[0])

    def _take(self, line: dict[str, Any]) -> None:
        step = line["step"]
        self.loss.add(step, line.get("loss"))
        self.density.add(step, line.get("density"))
        self.validation.add(step, line.get("validation_loss"))
        self.results |= {name: value for name, value in line.items() if name.startswith("validation_")}
        self.seconds = line.get("elapsed", self.seconds + line["seconds"].get("wall", 0.0))
        self.line = line

    def refuse(self, error: Exception) -> None:
        """Take nothing from its lines, since a value in them cannot be shown."""
        self._begin()
        self.damage["metrics.jsonl"] = f"metrics.jsonl: {error}"

    @property
    def sign(self) -> float:
        """The newest time of its files."""
        return max((stamp[2] / 1e9 for stamp in self._stamps.values()), default=0.0)

    @property
    def status(self) -> str:
        """As recorded, or `silent` for a run that should have written by now, or `damaged`."""
        if self.damage:
            return "damaged"
        usual = _WINDOWS * self.line["seconds"].get("wall", 0.0) if self.line else _TO_START
        is_silent = time.time() - self.sign > max(_PATIENCE, usual)
        return "silent" if self.recorded in ("created", "running") and is_silent else self.recorded


class Runs:
    """The runs below some directories; `update` finds new ones and forgets those whose directory is gone."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = [root.absolute() for root in roots]
        self._known: dict[Path, Run] = {}

    def update(self) -> list[Run]:
        """Read what is new; return the runs, the one that wrote last first."""
        found = {directory: root for root in self._roots for directory in _directories(root)}
        self._known = {d: self._known.get(d) or Run(d, root) for d, root in found.items()}
        for run in self._known.values():
            run.update()
        return sorted(self._known.values(), key=lambda run: (-run.sign, run.record.directory))


def _directories(root: Path) -> Iterator[Path]:
    """Yield the directories of runs, and do not look into them."""
    for place, inside, files in os.walk(root):
        if "status.json" in files:
            inside.clear()
            yield Path(place)


def apart(runs: Iterable[Run]) -> dict[Run, str]:
    """Return for each run the settings in which it differs from others of its arm beside it, in short."""
    arms: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        arms[(run.record.directory.parent, str(run.labels.get("arm")))].append(run)
    found = {}
    for those in arms.values():
        names = sorted({name for run in those for name in run.differs}, key=lambda name: (name == "seed", name))
        varied = [name for name in names if len({str(run.differs.get(name)) for run in those}) > 1]
        for run in those:
            found[run] = shown({name: run.differs[name] for name in varied if name in run.differs})
    return found
