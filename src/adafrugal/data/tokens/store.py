"""Token stores: shards on disk, written once in document order, read through memory maps.

<cache_root>/tokens/<name>-<hash>/
about.json                       source, tokenizer and fingerprint of the tokens, for people
tokenizer.*                      the tokenizer's files, for people
train/, validation/
    00000.tokens.npy             uint16 or uint32 [tokens]
    00000.ends.npy               int64 [documents]
    00000.token_bytes.npy        uint32 [tokens], in validation/
    index.jsonl                  a line per complete shard: counts, checksums, position of the next shard
    ended                        empty; exists if the text has no further shard
    .lock                        locked by the process that writes

A shard's line is written after its files are flushed to disk. A shard without a complete line is ignored.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adafrugal.data.rows import Layout
from adafrugal.data.text import faults
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard
from adafrugal.system import files
from adafrugal.system.errors import SettingError

ARRAYS = ("tokens", "ends", "token_bytes")


@dataclass(frozen=True)
class Entry:
    """A line of the index."""

    documents: int  # number in the shard
    tokens: int  # number in the shard
    text_bytes: int  # of the documents
    size: int  # of its files, in bytes
    skipped: dict[str, int]  # reason -> number of skipped documents
    checksums: dict[str, int]  # CRC-32 of each array's data, by its name
    after: list[int]  # numbers of the file and the piece at which the next shard begins


class StoredSplit:
    """The training or validation split of a store, as far as it is prepared.

    Args:
        directory: of the split; created before the first write.
        limit: bytes after which no window is added; None for no limit.
        window: shards per window; the limit acts only between windows, to keep the rows that are permuted together.
    """

    def __init__(self, directory: Path, limit: int | None = None, window: int = 1) -> None:
        self.directory, self._limit, self._window = directory, limit, window
        self._index = directory / "index.jsonl"
        self._remedy = f"remove {directory.parent}, and the same command prepares it again"
        self.entries: list[Entry] = []
        self.ended = self.full = False
        self._read_up_to = self._size = 0  # bytes of the index, and of the shards
        self._verified: set[int] = set()
        self._refreshing = threading.Lock()  # another thread makes batches
        self.refresh()

    @property
    def is_complete(self) -> bool:
        """Whether no shard will follow: the text has ended, or the limit is reached."""
        return self.ended or self.full

    def rows(self, layout: Layout, first: int = 0, stop: int | None = None) -> int:
        """Count the rows in a range of shards, by default all."""
        return sum(layout.count(entry.documents, entry.tokens) for entry in self.entries[first:stop])

    def counts(self) -> dict[str, Any]:
        """Count documents, tokens, bytes of text, and skipped documents by reason."""
        names = {"documents": "documents", "tokens": "tokens", "bytes": "text_bytes"}
        found = {name: sum(getattr(entry, count) for entry in self.entries) for name, count in names.items()}
        return found | {"skipped": dict(sum((Counter(entry.skipped) for entry in self.entries), Counter[str]()))}

    def refresh(self) -> None:
        """Read the lines added to the index since the last call."""
        with self._refreshing:
            if self.is_complete:
                return
            ended = (self.directory / "ended").exists()  # before the index, since it is written later
            if self._index.exists():
                with self._index.open("rb") as file:
                    file.seek(self._read_up_to)
                    whole, newline, _torn = file.read().rpartition(b"\n")
                for line in whole.splitlines():
                    try:
                        self.entries.append(Entry(**json.loads(line)))
                    except (ValueError, TypeError) as error:
                        raise SettingError(f"{self._index} is damaged; {self._remedy}") from error
                    self._size += self.entries[-1].size
                    ends_window = len(self.entries) % self._window == 0
                    self.full = ends_window and self._limit is not None and self._size >= self._limit
                    if self.full:
                        break
                self._read_up_to += len(whole) + len(newline)
            self.ended = ended and not self.full

    def position(self) -> Position:
        """Return where the next shard begins."""
        return Position(*self.entries[-1].after) if self.entries else Position()

    def shards(self) -> Iterator[Shard]:
        """Open all shards, in order."""
        return map(self.open, range(len(self.entries)))

    def open(self, number: int) -> Shard:
        """Open a shard as memory maps; verify its checksums the first time.

        Raises:
            SettingError: a file is missing or damaged.
        """
        entry = self.entries[number]
        arrays: dict[str, Any] = dict.fromkeys(ARRAYS)
        for name, checksum in entry.checksums.items():
            file = self._file(number, name)
            try:
                arrays[name] = np.load(file, mmap_mode="r")
                sound = number in self._verified or _checksum(arrays[name]) == checksum
            except (OSError, ValueError):
                sound = False
            if not sound:
                raise SettingError(f"{file} is damaged: it is not what was written; {self._remedy}")
        self._verified.add(number)
        return Shard(**arrays, text_bytes=entry.text_bytes, skipped=entry.skipped, after=Position(*entry.after))

    def _file(self, number: int, name: str) -> Path:
        return self.directory / f"{number:05}.{name}.npy"

    # -- writing --------------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Try to lock the split for writing; yield whether this process holds the lock."""
        is_alone = False
        with ExitStack() as stack:
            with faults.of_disk(self.directory), suppress(BlockingIOError):
                self.directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.locked(self.directory / ".lock"))
                is_alone = True
                self.refresh()
            yield is_alone

    def extend(self, shards: Iterable[Shard], enough: Callable[[], bool]) -> None:
        """Add shards until `enough` returns True or there are no more; call it only with the lock of `alone`.

        Raises:
            SettingError: the disk is full or cannot be written.
        """
        if self._index.exists():
            with faults.of_disk(self.directory):
                os.truncate(self._index, self._read_up_to)  # cut off an incomplete line that a killed process left
        for shard in shards:
            with faults.of_disk(self.directory):
                self._add(shard)
            self.refresh()
            if enough() or self.is_complete:
                return
        with faults.of_disk(self.directory):
            (self.directory / "ended").touch()
        self.refresh()

    def _add(self, shard: Shard) -> None:
        checksums, size = {}, 0
        for name in ARRAYS:
            if (array := getattr(shard, name)) is not None:
                with self._file(len(self.entries), name).open("wb") as opened:
                    np.save(opened, array)
                    files.to_disk(opened)
                    size += opened.tell()
                checksums[name] = _checksum(array)
        counts = len(shard.ends), len(shard.tokens), shard.text_bytes, size
        with self._index.open("a") as index:
            index.write(json.dumps(asdict(Entry(*counts, shard.skipped, checksums, list(shard.after)))) + "\n")
            files.to_disk(index)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8))
