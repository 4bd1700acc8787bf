"""Run the jobs of one command. A job's end is a value, so that any launcher can return it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from adafrugal.settings.compose import check
from adafrugal.settings.naming import name_run
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG, SettingError
from adafrugal.system.secrets import hidden
from adafrugal.system.signals import Stop
from adafrugal.system.stderr import tell
from adafrugal.training import session
from adafrugal.training.distributed import ranks
from adafrugal.training.failure import End, classify

if TYPE_CHECKING:
    from adafrugal.tracking.record import Record

TOLD = "ADAFRUGAL_END"  # path where a child writes its `Job`, since torchrun replaces every exit code by 1


class Job(NamedTuple):
    """A job that has ended: its overrides as typed, its exit code as of a command, and the cause if more is known."""

    words: str
    code: int
    reason: str = ""
    is_shared: bool = False  # of a setting that is wrong: the sweep's other jobs would end so, too

    @property
    def outcome(self) -> str:
        """The meaning of the exit code, in a word."""
        return {DONE: "done", FAILED: "failed", WRONG: "refused", INTERRUPTED: "interrupted"}[self.code]


class Jobs:
    """The task function that Hydra calls with each job's settings; collects how the jobs ended."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop  # of this process, entered
        self.ends: dict[int, Job] = {}  # by the job's number; the sweeper adds those that ran in other processes

    def __call__(self, composed: DictConfig) -> Job:
        """Run one job in this process. Return its error as a `Job`, so that a sweep's other jobs still run."""
        hydra_config = HydraConfig.get()
        typed = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        words = " ".join(typed)
        number = OmegaConf.select(hydra_config, "job.num", default=0)
        # stays if the job is interrupted
        self.ends[number] = job = Job(words, INTERRUPTED, "not started" if self.stop.requested else "")
        if self.stop.requested:
            return job
        if (refused := after_a_refusal(self.ends, words)) is not None:
            self.ends[number] = job = Job(words, WRONG, refused)
            return job
        is_sweep = hydra_config.mode == RunMode.MULTIRUN
        launcher = next((word for word in hydra_config.overrides.hydra if word.startswith("hydra/launcher=")), None)
        if launcher and not is_sweep:
            end = ended(SettingError(f"{launcher} starts the jobs of a sweep; add -m, or leave it out"), self.stop)
        else:
            sys.stdout.write(f"\n── job {number + 1}: {words}\n" if is_sweep else "")
            end = run(composed, hydra_config.runtime.choices, self.stop, typed)
        self.ends[number] = job = Job(words, end.code, end.reason, end.is_shared)
        if (file := os.environ.get(TOLD)) and ranks.is_first():
            Path(file).write_text(json.dumps(job))
        return job

    @property
    def code(self) -> int:
        """The exit code of the command: the first of interrupted, failed and refused that a job has, else done."""
        codes = {job.code for job in self.ends.values()}
        return next((code for code in (INTERRUPTED, FAILED, WRONG) if code in codes), DONE)

    def print(self) -> None:
        """Print how each job of a sweep ended, and why."""
        if len(self.ends) > 1:
            lines = [
                f"{job.outcome:>11}  job {number + 1}: {job.words}{job.reason and f': {job.reason}'}\n"
                for number, job in sorted(self.ends.items())
            ]
            sys.stdout.write(hidden("\n" + "".join(lines)))


def after_a_refusal(ends: Mapping[int, Job], words: str) -> str | None:
    """Return why a further job of a sweep does not start, from the ends of others by number; None: it may.

    A setting that a job finds to be wrong stops the sweep, as one that is wrong before the first job does, except jobs
    whose words set it otherwise: the reason begins with its name.
    """
    for number, job in sorted(ends.items()):
        if job.is_shared:
            setting = job.reason.partition(" ")[0].rstrip(":,")
            others = {*job.words.split(" ")} ^ {*words.split(" ")}
            names = {word.partition("=")[0].lstrip("+") for word in others}
            if not any(f"{setting}.".startswith(f"{name}.") or name == "experiments" for name in names):
                return f"not started, since job {number + 1} was refused"
    return None


def run(composed: DictConfig, choices: Mapping[str, str], stop: Stop, words: Sequence[str]) -> End:
    """Check the settings and make their run, which `words` name at W&B.

    Raises:
        KeyboardInterrupt: a signal arrived before the run could end in order. Nothing else is raised.
    """
    settings = None
    try:
        settings = check(composed, choices)
        name_run(settings, words)
        record, outcome = session.run(settings, choices, stop)
        if outcome != "interrupted" and ranks.is_first():
            if outcome == "finished before":
                anew = "nothing is done; remove its directory to make it anew"
                sys.stdout.write(f"this run was finished before: {anew}\n")
            _show(record)
        return End(INTERRUPTED if outcome == "interrupted" else DONE)
    except Exception as error:
        if stop.was_lost:  # the error may be its consequence
            raise KeyboardInterrupt from error
        return ended(error, stop, is_alike=settings is None)


def ended(error: BaseException, stop: Stop, is_alike: bool = False) -> End:
    """Print why a job ended; nothing else does. If all ranks see the error (`is_alike`), only rank 0 prints it."""
    end = classify(KeyboardInterrupt() if stop.was_lost else error)
    if end.text and (ranks.is_first() or not is_alike):
        tell(end.text)
    return end


def _show(record: Record) -> None:
    """Print the summary of a finished run; draw its picture if it is missing."""
    from adafrugal.reports import pictures, summary

    file = record.directory / "picture.svg"
    if not file.exists():
        try:
            pictures.draw_run(record, file)
        except OSError as error:  # the run is done and its record complete
            tell(f"warning: {file} cannot be written: {error.strerror}")
    sys.stdout.write(f"\n{summary.text(record)}\n")
