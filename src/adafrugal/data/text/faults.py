"""What went wrong with a source, in one line: which repository or file, why, and what to do."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from adafrugal.system.errors import SettingError, chain

LOCAL_COPY = "or copy it to this machine and set {setting} to that directory"


@contextmanager
def of_hub(setting: str, name: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line; `setting` is the setting that names the repository."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it tells of every retry
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        line = explain_hub(error, setting, name)
        if line is None:
            raise
        raise SettingError(line) from error


def explain_hub(error: BaseException, setting: str, name: str) -> str | None:
    """The line for an error of the hub or of a missing local path; None for any other error."""
    local = LOCAL_COPY.format(setting=setting)
    kinds = {type(e).__name__ for e in chain(error)}
    status = _status(error)
    if "GatedRepoError" in kinds or "is a gated dataset on the Hub" in str(error):  # datasets drops the client's error
        return (
            f"{setting} is {name}, which is gated: ask for access on its page at the hub, then `hf auth login` "
            f"(or set HF_TOKEN), {local}"
        )
    if status == 429:
        return f"{setting} is {name}, and the hub limits the rate of requests (429): wait, `hf auth login`, {local}"
    if status is not None and status >= 500:
        return f"{setting} is {name}, and the hub has an error of its own ({status}): try again later, {local}"
    if "RevisionNotFoundError" in kinds:
        revision = setting.rpartition(".")[0] + ".revision"
        return f"{setting} is {name}, which has no such {revision}; allowed: a branch, a tag or a commit's sha"
    if status in (401, 403, 404) or kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        return (
            f"{setting} is {name}, which the hub does not have or does not show: check the name, "
            f"`hf auth login` if it is private, {local}"
        )
    if kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return f"{setting} is {name}, which has no data files that datasets can read"
    if "HFValidationError" in kinds:
        return f"{setting} is {name}, which is no directory, and no hub repository can be called so"
    if _is_connection(error):
        if _is_offline():
            return f"{setting} is {name}, but HF_HUB_OFFLINE is set: unset it, {local}"
        return f"{setting} is {name}, and the hub cannot be reached: check the network, {local}"
    return None


def explain_file(error: BaseException, file: str, documents: int) -> str:
    """The line for an error in the middle of a file."""
    reason = " ".join(str(error).split()) or type(error).__name__
    where = f"{file} cannot be read after {documents:,} documents"
    if isinstance(error, EOFError | zlib.error) or type(error).__name__ in ("BadGzipFile", "ArrowInvalid"):
        return f"{where}: it is damaged ({reason}); get the file again"
    goes_on = "the same command goes on from there, data.source can also be a local copy"
    if isinstance(error, FileNotFoundError) and file.startswith("hf://"):
        return f"{where}: the hub no longer has it or does not show it, `hf auth login` if it is private; {goes_on}"
    if isinstance(error, FileNotFoundError):
        return f"{where}: it is no longer there; bring it back"
    if status := _status(error):
        return f"{where}: the hub answers {status}; {goes_on}"
    if _is_connection(error):
        return f"{where}: {reason}; {goes_on}"
    return f"{where}: {type(error).__name__}: {reason}; mend or replace the file"


def refuse_other_data(before: str, now: str) -> None:
    """Insist that a run goes on with the data it began with.

    Raises:
        SettingError: the fingerprints differ.
    """
    if now != before:
        raise SettingError(
            f"the run was begun on other data (fingerprint {before[:12]}, now {now[:12]}): bring back what its "
            "environment.json names (package versions, files, tokenizer), or remove its directory to begin anew"
        )


def may_pass(error: BaseException) -> bool:
    """Whether an error is the network's or the hub's, and trying again later may help."""
    status = _status(error)
    return status == 429 or (status or 0) >= 500 or (status is None and _is_connection(error) and not _is_offline())


def _status(error: BaseException) -> int | None:
    """What the hub answered, where an error comes of an answer."""
    found = (getattr(getattr(e, "response", None), "status_code", None) for e in chain(error))
    return next((status for status in found if status), None)


def _is_connection(error: BaseException) -> bool:
    """Whether an error is the network's; the hub's client says so by httpx's TransportError and its own class."""
    names = {kind.__name__ for e in chain(error) for kind in type(e).__mro__}
    return bool(names & {"ConnectionError", "TransportError", "LocalEntryNotFoundError"})


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()
