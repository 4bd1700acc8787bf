"""Records of many runs in one file, DIRECTORY.tar.xz beside DIRECTORY; equal records give equal bytes."""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import FILES, Record

SUFFIX = ".tar.xz"


class Packed(Record):
    """The record of a run in an archive; `directory` is where `unpack` would write it."""

    def __init__(self, archive: Path, name: str, files: dict[str, bytes]) -> None:
        super().__init__(unpacked(archive) / name)
        self.archive, self.name, self.files = archive, name, files

    def _bytes(self, name: str, offset: int = 0) -> bytes | None:
        found = self.files.get(name)
        return None if found is None else found[offset:]


def find(places: Iterable[Path]) -> list[Record]:
    """Return the runs below some directories, as train.py wrote them or packed, sorted by directory.

    A place may also be an archive, or a directory that was replaced by an archive beside it.
    """
    packed: dict[Path, Record] = {}
    plain: dict[Path, Record] = {}  # preferred to the packed form of the same run
    for place in places:
        beside = Path(f"{place}{SUFFIX}")
        archives = [place] if place.is_file() else [*place.rglob(f"*{SUFFIX}"), *([beside] if beside.exists() else [])]
        packed |= {run.directory: run for archive in archives for run in read(archive)}
        plain |= {file.parent: Record(file.parent) for file in place.rglob("status.json")}
    found = packed | plain
    return [found[directory] for directory in sorted(found)]


def read(archive: Path) -> list[Packed]:
    """Return the records of an archive.

    Raises:
        SettingError: the file is missing or is no archive of records.
    """
    runs: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(archive, "r:xz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.is_absolute() or ".." in path.parts or path.name not in FILES:
                    raise SettingError(f"{archive} has {member.name!r}, which is no part of a run's record")
                runs.setdefault(path.parent.as_posix(), {})[path.name] = tar.extractfile(member).read()
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise SettingError(f"{archive} cannot be read: {error}; name an archive that --pack wrote") from error
    return [Packed(archive, name, files) for name, files in runs.items()]


def pack(directory: Path) -> Path:
    """Write the records below a directory to an archive beside it, without checkpoints and pictures.

    Raises:
        SettingError: there are no runs.
    """
    runs = sorted(file.parent for file in directory.rglob("status.json"))
    if not runs:
        raise SettingError(f"there are no runs in {directory}; name a directory with runs below it")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in (run / name for run in runs for name in FILES if (run / name).exists()):
            member, content = tarfile.TarInfo(file.relative_to(directory).as_posix()), file.read_bytes()
            member.size = len(content)  # no owner and no time, so that equal records give equal bytes
            tar.addfile(member, io.BytesIO(content))
    archive = directory.with_name(directory.name + SUFFIX)
    archive.write_bytes(lzma.compress(data.getvalue(), preset=9))
    return archive


def unpacked(archive: Path) -> Path:
    """Return the directory from which an archive was made."""
    return archive.with_name(archive.name.removesuffix(SUFFIX))


def unpack(archive: Path, directory: Path) -> int:
    """Write the records of an archive to a directory, byte for byte; return their number."""
    runs = read(archive)
    for run in runs:
        (directory / run.name).mkdir(parents=True, exist_ok=True)
        for name, data in run.files.items():
            (directory / run.name / name).write_bytes(data)
    return len(runs)
