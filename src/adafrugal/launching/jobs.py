"""The jobs of one command: each is a run, and how it ended is a value, which any launcher can bring home."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from adafrugal.settings.compose import check
from adafrugal.settings.explain import explain
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.system.secrets import hidden
from adafrugal.system.signals import Stop
from adafrugal.training.distributed import ranks

if TYPE_CHECKING:
    from adafrugal.tracking.record import Record

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 75
TOLD = "ADAFRUGAL_END"  # a file in which who started a process finds how its job ended; torchrun makes 1 of every code


class End(NamedTuple):
    """How a job ended.

    Args:
        words: its settings, as they were typed.
        code: the exit code that it would have as a command.
        reason: why it is that one, where there is more to say.
    """

    words: str
    code: int
    reason: str = ""


class Jobs:
    """What Hydra calls with the settings of each job, and how all of them ended.

    Args:
        stop: of this process, entered.

    Attributes:
        ends: by the job's number. Hydra's sweeper adds those of jobs that ran elsewhere.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.ends: dict[int, End] = {}

    def __call__(self, composed: DictConfig) -> End:
        """Run one job in this process. No error leaves here: a sweep's other jobs still run."""
        hydra_config = HydraConfig.get()
        words = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        number = OmegaConf.select(hydra_config, "job.num", default=0)
        end = End(" ".join(words), INTERRUPTED, "not started" if self.stop.requested else "")
        self.ends[number] = end  # an interruption leaves it so
        if self.stop.requested:
            return end
        if hydra_config.mode == RunMode.MULTIRUN:
            sys.stdout.write(f"\n── job {number + 1}: {end.words}\n")
            code, reason = run(composed, hydra_config.runtime.choices, self.stop)
        elif launcher := _typed_launcher(hydra_config):
            code, reason = ended(SettingError(f"{launcher} starts the jobs of a sweep; add -m, or leave it out"))
        else:
            code, reason = run(composed, hydra_config.runtime.choices, self.stop)
        self.ends[number] = end._replace(code=code, reason=reason)
        _tell_who_started_it(self.ends[number])
        return self.ends[number]

    @property
    def code(self) -> int:
        """One exit code for all of them."""
        codes = {end.code for end in self.ends.values()}
        return next((code for code in (INTERRUPTED, FAILED, WRONG) if code in codes), DONE)

    def print(self) -> None:
        """List how each job of a sweep ended, and why."""
        if len(self.ends) > 1:
            lines = (f"{named(end):>11}  job {number + 1}: {said(end)}\n" for number, end in sorted(self.ends.items()))
            sys.stdout.write("\n" + "".join(lines))


def run(composed: DictConfig, choices: Mapping[str, str], stop: Stop) -> tuple[int, str]:
    """Make the run that these settings describe; the exit code, and why it is that one.

    Raises:
        KeyboardInterrupt: somebody asked to stop before the run could end in order. Nothing else is raised.
    """
    settings = None
    try:
        settings = check(composed, choices)

        # imported late: a wrong setting needs none of it
        from adafrugal.training.session import run as make

        record, outcome = make(settings, choices, stop)
        if outcome == "interrupted":
            return INTERRUPTED, ""
        if not ranks.is_first():
            return DONE, ""
        if outcome == "finished before":
            sys.stdout.write("this run was finished before: nothing is done; remove its directory to make it anew\n")
        _show(record)
        return DONE, ""
    except Exception as error:
        if stop.was_lost:  # this is what became of it
            raise KeyboardInterrupt from error
        if settings is None and isinstance(error, SettingError) and not ranks.is_first():
            return WRONG, hidden(str(error))  # all processes see the same settings, and the first says it
        return ended(error)


def ended(error: Exception) -> tuple[int, str]:
    """Say why a job ended; its exit code and the reason."""
    if isinstance(error, SettingError):
        return refused(error), hidden(str(error))
    if isinstance(error, ranks.LostError) and error.is_told:
        return FAILED, hidden(str(error))
    if isinstance(error, TrainingError):
        tell(f"error: {hidden(str(error))}\n")
        return FAILED, hidden(str(error))
    tell(hidden("".join(traceback.format_exception(error))))
    return FAILED, hidden(" ".join(f"{type(error).__name__}: {error}".split()))


def refused(error: Exception) -> int:
    """Say what is wrong with a setting, in one line; the exit code."""
    line = str(error) if isinstance(error, SettingError) else explain(error)
    tell(f"error: {hidden(line)}\n")
    return WRONG


def tell(text: str) -> None:
    """Write to stderr; where nobody is left to read it, the exit code still says how it ended."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def named(end: End) -> str:
    """How it ended, in a word."""
    return {DONE: "done", FAILED: "failed", WRONG: "refused", INTERRUPTED: "interrupted"}[end.code]


def said(end: End) -> str:
    """The job, and why it ended as it did."""
    return f"{end.words}{end.reason and f': {end.reason}'}"


def _show(record: Record) -> None:
    """Print the summary of a finished run and see that it has its picture."""
    from adafrugal.reports import pictures, summary

    file = record.directory / "picture.svg"
    if not file.exists():
        try:
            pictures.draw_run(record, file)
        except OSError as error:  # the run is done and its record whole
            sys.stderr.write(f"warning: {file} cannot be written: {error.strerror}\n")
    sys.stdout.write(f"\n{summary.text(record)}\n")


def _typed_launcher(hydra_config: DictConfig) -> str | None:
    return next((word for word in hydra_config.overrides.hydra if word.startswith("hydra/launcher=")), None)


def _tell_who_started_it(end: End) -> None:
    if (file := os.environ.get(TOLD)) and os.environ.get("RANK", "0") == "0":
        Path(file).write_text(json.dumps(end))
