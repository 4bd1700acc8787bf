"""Token stores: shards on disk, written once in the order of the documents, read through memory maps.

<cache_root>/tokens/<name>-<hash>/
about.json                       what the tokens were made of, and the fingerprint that identifies them
train/, validation/
    00000.tokens.npy             uint16 or uint32 [tokens]
    00000.ends.npy               int64 [documents]
    00000.token_bytes.npy        uint32 [tokens], in validation/
    index.jsonl                  a line for each whole shard: counts, checksums, where the next one begins
    ended                        an empty file: the text has no further shard
    .lock                        held by the process that writes

A shard exists once its line is whole, and its line is written when its files are on the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adafrugal.data.rows import Layout
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard
from adafrugal.system import files
from adafrugal.system.errors import SettingError

ARRAYS = ("tokens", "ends", "token_bytes")


@dataclass(frozen=True)
class Entry:
    """A line of the index.

    Args:
        documents, tokens, text_bytes: how much there is in the shard.
        size: of its files, in bytes.
        skipped: reason -> documents that were left out.
        checksums: CRC-32 of each file, by the array's name.
        after: file and piece at which the next shard begins.
    """

    documents: int
    tokens: int
    text_bytes: int
    size: int
    skipped: dict[str, int]
    checksums: dict[str, int]
    after: list[int]


class StoredPart:
    """The training or validation part of a store, as far as it is prepared.

    Args:
        directory: of the part; made when it is first written to.
        limit: bytes after which no window is added; None for no limit.
        window: shards in one, so that a limit never changes the rows that are permuted together.
    """

    def __init__(self, directory: Path, limit: int | None = None, window: int = 1) -> None:
        self.directory, self._limit, self._window = directory, limit, window
        self.entries: list[Entry] = []
        self.ended = self.full = False
        self._read_up_to = self._size = 0  # bytes: of the index, of the shards
        self._verified: set[int] = set()
        self._refreshing = threading.Lock()  # batches are made in a thread of their own
        self.refresh()

    @property
    def is_complete(self) -> bool:
        """Whether there will be no further shard: the text has ended, or the limit is reached."""
        return self.ended or self.full

    def refresh(self) -> None:
        """Read what was added to the index since the last time."""
        with self._refreshing:
            if not self.is_complete:
                self._read_on()

    def _read_on(self) -> None:
        ended = (self.directory / "ended").exists()  # asked before the index is read: it is written after it
        index = self.directory / "index.jsonl"
        if index.exists():
            with index.open("rb") as file:
                file.seek(self._read_up_to)
                whole, newline, _torn = file.read().rpartition(b"\n")
            for line in whole.splitlines():
                if not self.full:
                    self.entries.append(_entry(line, index))
                    self._size += self.entries[-1].size
                    is_whole = len(self.entries) % self._window == 0
                    self.full = is_whole and self._limit is not None and self._size >= self._limit
            self._read_up_to += len(whole) + len(newline)
        self.ended = ended and not self.full

    def position(self) -> Position:
        """Where the next shard begins."""
        return Position(*self.entries[-1].after) if self.entries else Position()

    def open(self, number: int) -> Shard:
        """A shard; its checksums are verified when this process first opens it.

        Raises:
            SettingError: a file is missing or damaged.
        """
        entry = self.entries[number]
        arrays: dict[str, Any] = dict.fromkeys(ARRAYS)
        for name in entry.checksums:
            file = self._file(number, name)
            try:
                arrays[name] = np.load(file, mmap_mode="r")
                sound = number in self._verified or _checksum(arrays[name]) == entry.checksums[name]
            except (OSError, ValueError):
                sound = False
            if not sound:
                raise SettingError(
                    f"{file} is damaged: it is not what was written; remove {self.directory.parent}, and the same "
                    "command prepares it again"
                )
        self._verified.add(number)
        return Shard(**arrays, text_bytes=entry.text_bytes, skipped=entry.skipped, after=Position(*entry.after))

    def _file(self, number: int, name: str) -> Path:
        return self.directory / f"{number:05}.{name}.npy"

    # -- writing --------------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Try to be the one process that writes this part; True where that is so."""
        with _on_disk(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self.refresh()
            yield True

    def extend(self, shards: Iterable[Shard], enough: Callable[[], bool]) -> None:
        """Add shards until there are enough or no more; call it only while `alone`.

        Raises:
            SettingError: the disk is full or cannot be written; what is half-written is removed.
        """
        self._mend_index()
        for shard in shards:
            self._add(shard)
            self.refresh()
            if enough() or self.is_complete:
                return
        with _on_disk(self.directory):
            (self.directory / "ended").touch()
        self.refresh()

    def _add(self, shard: Shard) -> None:
        number = len(self.entries)
        written: list[Path] = []
        checksums, size = {}, 0
        try:
            with _on_disk(self.directory):
                for name in ARRAYS:
                    array = getattr(shard, name)
                    if array is None:
                        continue
                    file = self._file(number, name)
                    written.append(file)
                    with file.open("wb") as opened:
                        np.save(opened, array)
                        _to_disk(opened)
                    checksums[name] = _checksum(array)
                    size += file.stat().st_size
                after = [shard.after.file, shard.after.piece]
                entry = Entry(
                    len(shard.ends), len(shard.tokens), shard.text_bytes, size, shard.skipped, checksums, after
                )
                with (self.directory / "index.jsonl").open("a") as index:
                    index.write(json.dumps(asdict(entry)) + "\n")
                    _to_disk(index)
        except BaseException:
            with suppress(SettingError):
                self._mend_index()
            for file in written:
                file.unlink(missing_ok=True)
            raise

    def _mend_index(self) -> None:
        """Cut off the half of a line that a killed process left."""
        index = self.directory / "index.jsonl"
        if index.exists():
            with _on_disk(self.directory):
                os.truncate(index, self._read_up_to)


def _entry(line: bytes, index: Path) -> Entry:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise SettingError(
            f"{index} is damaged; remove {index.parent.parent}, and the same command prepares it again"
        ) from error


def rows(part: StoredPart, layout: Layout, window: int) -> int:
    """The rows in the windows of `window` shards that are prepared."""
    usable = len(part.entries) if part.is_complete else len(part.entries) // window * window
    return sum(layout.count(entry.documents, entry.tokens) for entry in part.entries[:usable])


@contextmanager
def _on_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingError(files.explain_disk(error, str(directory))) from error


def _to_disk(file: Any) -> None:
    """Wait until what was written would survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8))
