"""Searches for each arm's rates: at most so many trials each, on seeds that no table uses; every trial is a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adafrugal.reports.arms import Job
from adafrugal.reports.descent import LR, C, Descent, Rates, S
from adafrugal.settings.canonical import OF_SIZE, described
from adafrugal.settings.optimizer_settings import FrugalSettings
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

RULE = (
    "lr is the learning rate of embeddings, norms and head; lr·s is that of the split matrices, or of their part with "
    "state; lr·s·c is that of their part without. A search moves along one of the three at a time, by factors of 2 and "
    "then of √2, as long as the loss at the end of a trial falls. Cut off: its trials were spent while neighbours of "
    "the best were still untried. Seeds − trial: the mean over the table's seeds less the best trial; far above 0, the "
    "rates may be those of one lucky run. At an edge: on these axes no trial lies below the best one, or none above it."
)


@dataclass
class SearchFile:
    """How the rates of a section's arms are searched, as its file describes it."""

    trials: int = 16  # of each arm, at most
    seeds: list[int] = field(default_factory=lambda: [100])  # of each trial


@dataclass(frozen=True)
class Search:
    """The search of one arm."""

    how: SearchFile
    arm: Job  # at the rates to begin with
    found: Descent
    trials: Sequence[Job]  # that have runs, in the order of the search
    pending: Sequence[Job]  # to make next

    @property
    def best(self) -> Job:
        """The arm at the best rates so far, with the arm's seeds."""
        return self.arm.at(self.found.rates(self.found.best), self.arm.seeds)


def search(arm: Job, how: SearchFile, runs: Callable[[Job], Mapping[int, Record]]) -> Search:
    """Return the search of an arm as far as its runs go.

    Args:
        arm: the arm at the rates to begin with.
        how: the number of trials and their seeds.
        runs: returns the finished and the diverged runs of a job by seed.

    Raises:
        SettingError: the arm is no pre-training, it has no s, it begins at a rate of 0, or one of the table's seeds is
            one of the search's.
    """
    if arm.settings.task.kind != "pretrain":
        raise SettingError(f"a search compares losses of pre-training; {arm.name} has task={arm.settings.task.kind}")
    if missing := {LR, S} - arm.rates.keys():
        raise SettingError(f"a search needs lr and s; {arm.name} has no {', '.join(sorted(missing))}")
    if zeros := [name for name, rate in arm.rates.items() if not rate]:
        raise SettingError(f"a search multiplies rates, and {arm.name} has {zeros[0]}=0; begin it above 0")
    if both := set(how.seeds) & set(arm.seeds):
        raise SettingError(f"the search of {arm.name} uses seed {min(both)}, which its table uses; take other seeds")
    made: dict[str, Job] = {}

    def job(rates: Rates) -> Job:
        trial = arm.at(rates, tuple(how.seeds))
        found = runs(trial)
        finished = {seed: run for seed, run in found.items() if run.status == "finished"}
        diverged = tuple(seed for seed in found if seed not in finished)
        return replace(trial, runs=finished, diverged=diverged)

    def loss(rates: Rates) -> float | None:
        trial = made[str(rates)] = job(rates)
        if trial.missing:
            return None
        return math.inf if trial.diverged else statistics.mean(trial.numbers("validation_loss"))

    rates = {name: rate for name, rate in arm.rates.items() if name != C or _has_both_parts(arm)}
    found = Descent(rates, how.trials, loss)
    trials = [made[str(found.rates(point))] for point in found.tried]
    return Search(how, arm, found, trials, [made[str(found.rates(point))] for point in found.pending])


def _has_both_parts(arm: Job) -> bool:
    """Return whether some weights keep state at rate lr·s and others do not at lr·s·c.

    Without the former c is another name of s; without the latter it has no effect.
    """
    o = arm.settings.optimizer
    if not isinstance(o, FrugalSettings):
        return False
    share, modules = described(o.density if o.rank is None else o.rank), o.modules
    sizes = {share[key] for key in OF_SIZE if key in share}
    treatments = modules.embeddings, modules.norms, modules.head, *([modules.unsplit] if modules.split else [])
    is_full = sizes == {1} and o.rank is None and min((modules.density_scale or {}).values(), default=1) >= 1
    return sizes != {0} and (not is_full or "state_free" in treatments)
