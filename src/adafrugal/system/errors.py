"""The errors that end a run with one line for its user. All others are defects, and are shown whole."""

from __future__ import annotations

from collections.abc import Iterator


class SettingError(ValueError):
    """A wrong setting or a missing input: one line that says what was given, what is allowed, what to do."""


class TrainingError(RuntimeError):
    """A run that cannot go on: one line that says why and what to set."""


def line(error: BaseException) -> str:
    """The message of an error in one line; the name of its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
