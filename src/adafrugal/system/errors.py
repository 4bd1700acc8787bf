"""The errors that end a run with one line for its user, and the exit codes. All other errors are defects."""

from __future__ import annotations

from collections.abc import Iterator

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 75  # WRONG: a wrong setting or a missing input


class SettingError(ValueError):
    """A wrong setting or a missing input: one line that says what was given, what is allowed, what to do."""


class RunError(SettingError):
    """One run that cannot go on in its directory: its data are others, it is damaged, another process writes it.

    Other jobs of a sweep can.
    """


class TrainingError(RuntimeError):
    """A run that cannot go on: one line that says why and what to set."""


class MemoryRefusedError(TrainingError):
    """A run that was refused memory: one line that says so, and lines below it that say what lowers it."""


def line(error: BaseException) -> str:
    """The message of an error in one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the pages that torch may add to it."""
    return next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
