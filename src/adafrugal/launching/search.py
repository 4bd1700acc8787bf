"""`python -m adafrugal.launching.search WORDS`: search the rates of a sweep's arms, then make its runs at the best.

WORDS are those of train.py, such as `sweeps=past_adamw scale=mini data.source=/path/to/c4`. Each arm has at
most the same number of trials, on seeds that the sweep does not use; `adafrugal.reports.descent` says which rates are
tried. Then every seed of the sweep runs at the arm's best rates. All runs are ordinary ones: the same command goes on
where it stood, and a page of `experiments/tables` with the same words and a `search:` shows them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from adafrugal.launching import local
from adafrugal.reports import arms, plan, records
from adafrugal.reports.arms import Job
from adafrugal.reports.searches import Search, SearchFile, search
from adafrugal.settings.command_line import Parser
from adafrugal.settings.naming import SHORT
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG, SettingError
from adafrugal.system.signals import Stop
from adafrugal.system.stderr import tell
from adafrugal.tracking.record import Record


def main() -> int:
    """Make the trials and the runs; return the exit code as train.py does."""
    parser = Parser(
        prog="python -m adafrugal.launching.search", description=__doc__, beside_settings=True,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    usual = SearchFile()
    parser.add_argument("words", nargs="+", help="words of train.py")
    parser.add_argument("--trials", type=int, default=usual.trials, help=f"of each arm, at most ({usual.trials})")
    parser.add_argument("--seeds", default="100", help="of the trials, with commas between them (100)")
    parser.add_argument("--at-once", type=int, help="runs at a time; by default one on each GPU, or one on the CPU")
    try:
        given = parser.parse_intermixed_args()
        return _Work(given.words, _how(given), given.at_once).make()
    except SettingError as error:
        tell(f"error: {error}")
        return WRONG
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on")
        return INTERRUPTED


def _how(given: argparse.Namespace) -> SearchFile:
    for option in ("trials", "at_once"):
        number = getattr(given, option)
        if number is not None and number < 1:
            name = f"--{option.replace('_', '-')}"
            raise SettingError(f"{name} is {number}; allowed: a whole number from 1 on")
    seeds = given.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise SettingError(f"--seeds is {given.seeds}; allowed: whole numbers with commas between them")
    return SearchFile(given.trials, list(map(int, seeds)))


def of_one_source(found: Sequence[Record], jobs: Sequence[Job]) -> list[Record]:
    """Return the records that read the text of these jobs: two copies of a data set may differ, as own texts do."""
    sources = {getattr(job.settings.data, "source", None) for job in jobs}
    return [record for record in found if record.config().get("data", {}).get("source") in sources]


class _Work:
    """The runs of a command's jobs, and of the searches for their rates."""

    def __init__(self, words: Sequence[str], how: SearchFile, at_once: int | None) -> None:
        self._jobs, self._how = arms.jobs([shlex.join(words)]), how
        self._found: Mapping[str, Sequence[Record]] = {}
        roots = {job.settings.run_root for job in self._jobs}
        self._root = Path(roots.pop())
        devices: list[str | None] = [*local.gpus()] or [None]
        self._slots = [devices[n % len(devices)] for n in range(at_once or len(devices))]

    def make(self) -> int:
        """Make what is missing, round by round; a round is what the searches need to know to go on."""
        with Stop() as stop:
            stop.training = True  # the first signal lets the runs end in order
            before: list[tuple[str, ...]] = []
            while True:
                searches = self._searches()
                wanted = [job for each in searches for job in each.pending]
                wanted += [each.best for each in searches if not each.pending]
                missing = list(dict.fromkeys(words for job in wanted for words in self._missing(job)))
                if not missing:
                    self._print(searches)
                    return DONE
                if missing == before:
                    raise SettingError(f"{self._root} has no record of a run that was made: {' '.join(missing[0])}")
                before = missing
                code = self._run(missing, stop)
                if code == INTERRUPTED:
                    raise KeyboardInterrupt
                if code != DONE:
                    return code

    def _searches(self) -> list[Search]:
        self._found = plan.by_settings(of_one_source(records.find([self._root]), self._jobs))
        return [search(job, self._how, self._made) for job in self._jobs]

    def _made(self, job: Job) -> Mapping[int, Record]:
        return plan.runs_of(job, self._found)

    def _missing(self, job: Job) -> list[tuple[str, ...]]:
        there = self._made(job)
        return [(*shlex.split(job.command), f"seed={seed}") for seed in job.seeds if seed not in there]

    def _run(self, jobs: Sequence[Sequence[str]], stop: Stop) -> int:
        """Make some runs; return the worst exit code. A diverged run is a result."""
        ends = local.run(jobs, self._slots[: len(jobs)], 1, stop)
        codes = {end.code for end in ends if not (end.code == FAILED and plan.has_diverged(end.reason))}
        return next((code for code in (INTERRUPTED, FAILED, WRONG) if code in codes), DONE)

    def _print(self, searches: Sequence[Search]) -> None:
        for each in searches:
            losses = [run.summary()["validation_loss"] for run in self._made(each.best).values() if run.summary()]
            rates = ", ".join(f"{SHORT[name]} {rate:g}" for name, rate in each.best.rates.items())
            shown = " ".join(f"{loss:.4f}" for loss in losses)
            sides = f" (at an edge: {', '.join(open_sides)})" if (open_sides := each.found.open_sides()) else ""
            sys.stdout.write(f"{each.arm.name}: {rates} after {len(each.trials)} trials{sides}: {shown}\n")


if __name__ == "__main__":
    sys.exit(main())
