"""Locks, content that survives a power cut, and directories that appear only when they are whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_TRIES = 20  # to make a directory that other processes remove


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made with its directory where it is missing.

    Who holds the lock may remove the file. The lock of a file that is gone locks nothing: it is given up for a new one.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be made (with its `filename`), or its file system has no locks.
    """
    tries = 0
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = file.open("w")
        except FileNotFoundError:  # another process has just removed the directory, or a path below /proc
            if (tries := tries + 1) == _TRIES:
                raise
            continue
        with opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, opened):
                yield
                return


def _is_at(file: Path, opened: IO) -> bool:
    """Return whether an open file is the one of that name, which may have been removed or made anew."""
    try:
        return os.path.samestat(file.stat(), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False


def to_disk(path: Path | IO) -> None:
    """Wait until an open file's content, a file's, or a directory's names would survive a power cut."""
    if not isinstance(path, Path):
        path.flush()
        os.fsync(path.fileno())
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def made(place: Path) -> Iterator[Path]:
    """A scratch directory to fill, moved to `place` at the end; what an interruption leaves is never read.

    Where another process was first, its directory stays: names say what is in them.

    Raises:
        OSError: it cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".preparing-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        yield whole
        try:
            whole.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(whole)
