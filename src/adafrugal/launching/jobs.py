"""The jobs of one command: each is a run, and how it ended is a value, which any launcher can bring home."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from adafrugal.settings.compose import check
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG, SettingError
from adafrugal.system.secrets import hidden
from adafrugal.system.signals import Stop
from adafrugal.system.stderr import tell
from adafrugal.training import session
from adafrugal.training.distributed import ranks
from adafrugal.training.failure import End, classify

if TYPE_CHECKING:
    from adafrugal.tracking.record import Record

TOLD = "ADAFRUGAL_END"  # path where the child writes its `Job` for its launcher; torchrun makes 1 of every exit code


class Job(NamedTuple):
    """A job that has ended.

    Args:
        words: its settings, as they were typed.
        code: the exit code that it would have as a command.
        reason: why it is that one, where there is more to say.
    """

    words: str
    code: int
    reason: str = ""

    @property
    def outcome(self) -> str:
        """How it ended, in a word."""
        return {DONE: "done", FAILED: "failed", WRONG: "refused", INTERRUPTED: "interrupted"}[self.code]


class Jobs:
    """What Hydra calls with the settings of each job, and how all of them ended.

    Args:
        stop: of this process, entered.

    Attributes:
        ends: by the job's number. Hydra's sweeper adds those of jobs that ran elsewhere.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.ends: dict[int, Job] = {}

    def __call__(self, composed: DictConfig) -> Job:
        """Run one job in this process. No error leaves here: a sweep's other jobs still run."""
        hydra_config = HydraConfig.get()
        words = " ".join(OmegaConf.to_container(hydra_config.overrides.task, resolve=False))
        number = OmegaConf.select(hydra_config, "job.num", default=0)
        job = Job(words, INTERRUPTED, "not started" if self.stop.requested else "")
        self.ends[number] = job  # an interruption leaves it so
        if self.stop.requested:
            return job
        is_sweep = hydra_config.mode == RunMode.MULTIRUN
        launcher = next((word for word in hydra_config.overrides.hydra if word.startswith("hydra/launcher=")), None)
        if launcher and not is_sweep:
            end = ended(SettingError(f"{launcher} starts the jobs of a sweep; add -m, or leave it out"), self.stop)
        else:
            sys.stdout.write(f"\n── job {number + 1}: {words}\n" if is_sweep else "")
            end = run(composed, hydra_config.runtime.choices, self.stop)
        self.ends[number] = job = Job(words, end.code, end.reason)
        if (file := os.environ.get(TOLD)) and ranks.is_first():
            Path(file).write_text(json.dumps(job))
        return job

    @property
    def code(self) -> int:
        """One exit code for all of them."""
        codes = {job.code for job in self.ends.values()}
        return next((code for code in (INTERRUPTED, FAILED, WRONG) if code in codes), DONE)

    def print(self) -> None:
        """List how each job of a sweep ended, and why."""
        if len(self.ends) > 1:
            lines = [
                f"{job.outcome:>11}  job {number + 1}: {job.words}{job.reason and f': {job.reason}'}\n"
                for number, job in sorted(self.ends.items())
            ]
            sys.stdout.write(hidden("\n" + "".join(lines)))


def run(composed: DictConfig, choices: Mapping[str, str], stop: Stop) -> End:
    """Make the run that these settings describe.

    Raises:
        KeyboardInterrupt: a signal arrived before the run could end in order. Nothing else is raised.
    """
    settings = None
    try:
        settings = check(composed, choices)
        record, outcome = session.run(settings, choices, stop)
        if outcome == "interrupted":
            return End(INTERRUPTED)
        if ranks.is_first():
            if outcome == "finished before":
                sys.stdout.write(
                    "this run was finished before: nothing is done; remove its directory to make it anew\n"
                )
            _show(record)
        return End(DONE)
    except Exception as error:
        if stop.was_lost:  # the error may come of it
            raise KeyboardInterrupt from error
        return ended(error, stop, is_alike=settings is None)


def ended(error: BaseException, stop: Stop, is_alike: bool = False) -> End:
    """Print why a job ended, which nothing else does; where all processes of a run see an error, the first prints."""
    end = classify(error, stop)
    if end.text and (ranks.is_first() or not is_alike):
        tell(end.text)
    return end


def _show(record: Record) -> None:
    """Print the summary of a finished run and see that it has its picture."""
    from adafrugal.reports import pictures, summary

    file = record.directory / "picture.svg"
    if not file.exists():
        try:
            pictures.draw_run(record, file)
        except OSError as error:  # the run is done and its record whole
            tell(f"warning: {file} cannot be written: {error.strerror}")
    sys.stdout.write(f"\n{summary.text(record)}\n")
