"""Directories that appear under their names only when they are whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adafrugal.config import SettingError
from adafrugal.data import faults


@contextmanager
def made(place: Path) -> Iterator[Path]:
    """A scratch directory to fill, moved to `place` at the end; what an interruption leaves is never read.

    Where another process was first, its directory stays: names say what is in them.

    Raises:
        SettingError: it cannot be written.
    """
    try:
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
    except OSError as error:
        raise SettingError(faults.explain_disk(error, str(place.parent))) from error
