"""Explain errors of a source or of the cache in one line: the repository, file or directory, cause and remedy."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adafrugal.settings.repositories import is_path
from adafrugal.system.errors import RunError, SettingError, chain, line


@contextmanager
def of_hub(setting: str, name: str, otherwise: str = "") -> Iterator[None]:
    """Convert errors of the hub's client to a SettingError of one line; `setting` has the value `name`.

    `otherwise` begins the line of any other error, which is not converted if it is empty.
    """
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it logs every retry
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        if reason := _of_hub(error, setting):
            raise SettingError(f"{setting} is {name}, {reason}") from error
        if not otherwise:
            raise
        raise SettingError(f"{otherwise}: {line(error).partition(' Example of usage')[0]}") from error


@contextmanager
def of_model(setting: str, name: str) -> Iterator[None]:
    """Convert errors in reading a model from a directory or the hub to a SettingError of one line."""
    if is_path(name, needs_owner=False) and not Path(name).is_dir():
        raise SettingError(f"{setting} is {name}, and there is no such directory; a hub repository is owner/name")
    try:
        with of_hub(setting, name):
            yield
    except SettingError as error:
        near = Path(name).parent
        if "/" in name and near.is_dir() and not Path(name).exists():  # a path, perhaps
            raise SettingError(f"{error}; the directory {near} here has no {Path(name).name}") from error
        raise
    except Exception as error:  # no weights, damaged ones, no config.json, no such architecture, …
        reason = line(error).partition(" If this is a private repository")[0]
        raise SettingError(f"{setting} is {name}, which transformers cannot read: {reason}") from error


def _of_hub(error: BaseException, setting: str) -> str | None:
    """Explain an error of the hub or of a missing local path; None for any other error."""
    local = f"or copy it to this machine and set {setting} to that directory"
    kinds, status = {type(e).__name__ for e in chain(error)}, _status(error)
    revision = setting.rpartition(".")[0] + ".revision"
    is_gated = "GatedRepoError" in kinds or "is a gated dataset on the Hub" in str(error)  # datasets drops the class
    is_hidden = status in (401, 403, 404) or kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}
    unreached = "and the hub cannot be reached: check the network"
    if _is_offline():
        unreached = "but HF_HUB_OFFLINE is set: unset it"
    gated = "which is gated: ask for access on its page at the hub, then `hf auth login` (or set HF_TOKEN)"
    hidden = "which the hub does not have or does not show: check the name, `hf auth login` if it is private"
    lines = (
        (is_gated, f"{gated}, {local}"),
        (status == 429, f"and the hub limits the rate of requests (429): wait, `hf auth login`, {local}"),
        ((status or 0) >= 500, f"and the hub has an error of its own ({status}): try again later, {local}"),
        ("RevisionNotFoundError" in kinds, f"which has no such {revision}; allowed: a branch, a tag or a commit's sha"),
        (is_hidden, f"{hidden}, {local}"),
        (kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}, "which has no data files that datasets can read"),
        ("HFValidationError" in kinds, "which is no directory, and no hub repository can be called so"),
        (_is_connection(error), f"{unreached}, {local}"),
    )
    return next((text for holds, text in lines if holds), None)


@contextmanager
def of_disk(directory: Path) -> Iterator[None]:
    """Convert errors in writing under `cache_root` to a SettingError of one line."""
    try:
        yield
    except OSError as error:
        why = f"cache_root is {directory}: {error.strerror}; choose a directory that can be written to and has room"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room (the same command goes on), choose another cache_root, or set data.store_limit_gib"
            why = f"{directory} is full: {remedy}"
        raise SettingError(why) from error


def explain_file(error: BaseException, file: str, documents: int) -> str:
    """Return the line for an error in a file after so many documents."""
    reason, status = line(error), _status(error)
    is_damaged = isinstance(error, EOFError | zlib.error) or type(error).__name__ in ("BadGzipFile", "ArrowInvalid")
    is_gone = isinstance(error, FileNotFoundError)
    hidden = "the hub no longer has it or does not show it, `hf auth login` if it is private"
    goes_on = "the same command goes on from there, data.source can also be a local copy"
    lines = (
        (is_damaged, f"it is damaged ({reason}); get the file again"),
        (is_gone and file.startswith("hf://"), f"{hidden}; {goes_on}"),
        (is_gone, "it is no longer there; bring it back"),
        (status, f"the hub answers {status}; {goes_on}"),
        (_is_connection(error), f"{reason}; {goes_on}"),
        (True, f"{type(error).__name__}: {reason}; mend or replace the file"),
    )
    return f"{file} cannot be read after {documents:,} documents: " + next(text for holds, text in lines if holds)


def may_pass(error: BaseException) -> bool:
    """Return whether an error is of the network or the hub, so that a retry may succeed."""
    status = _status(error)
    return status == 429 or (status or 0) >= 500 or (status is None and _is_connection(error) and not _is_offline())


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of the hub's response; None if the error has no response."""
    found = (getattr(getattr(e, "response", None), "status_code", None) for e in chain(error))
    return next((status for status in found if status), None)


def _is_connection(error: BaseException) -> bool:
    """Return whether an error is of the network: ConnectionError, or a class of httpx or the hub's client."""
    names = {kind.__name__ for e in chain(error) for kind in type(e).__mro__}
    return bool(names & {"ConnectionError", "TransportError", "LocalEntryNotFoundError"})


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def refuse_other_data(before: str, now: str) -> None:
    """Raise RunError if the data's fingerprint has changed since the run began."""
    if now != before:
        raise RunError(
            f"the run was begun on other data (fingerprint {before[:12]}, now {now[:12]}): bring back what its "
            "environment.json names (package versions, files, tokenizer), or remove its directory to begin anew"
        )
