"""`train.py … --dry-run`: say what the jobs of a command will cost, and run none of them.

    --dry-run        list every job: tokens, FLOPs, memory, disk, and whether it is done; nothing is written
    --card h100      with its hours on one card of this kind
    --share 0.4      of the card's peak that it reaches
    --measure        with its hours on this machine, by 20 steps of each optimizer

Launchers and further processes of a start are ignored: hours are of one card.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from adafrugal.launching import jobs
from adafrugal.launching.cost_table import Row, of_one, of_sweep
from adafrugal.launching.costs import Counter, OnCard
from adafrugal.settings.command_line import Parser, no_option
from adafrugal.settings.compose import check
from adafrugal.settings.explain import nearest
from adafrugal.settings.identity import Identity, identify
from adafrugal.settings.schema import Settings
from adafrugal.system import threads
from adafrugal.system.errors import DONE, SettingError
from adafrugal.system.secrets import hidden
from adafrugal.system.signals import Stop
from adafrugal.tracking import cards
from adafrugal.tracking.record import Record
from adafrugal.training.distributed import ranks

# of the peak in model FLOPs: LLaMA 60M reaches 0.31 on an H100 with 128 × 256 tokens (docs/gpu.md), larger ones more
SHARE = 0.3


@dataclass(frozen=True)
class Options:
    """What train.py takes out of its words before Hydra sees them."""

    dry_run: bool
    on: OnCard | None
    measure: bool


def options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the options among train.py's words, and the words that are left for Hydra.

    Raises:
        SettingError: an unknown card, a share outside its range, or an option without the one that it belongs to.
    """
    parser = Parser(add_help=False, prog="python train.py", usage="%(prog)s … --dry-run [--card CARD [--share SHARE]]")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--card")
    parser.add_argument("--share", type=float)
    parser.add_argument("--measure", action="store_true")
    given, left = parser.parse_known_args(words)
    known = [*parser._option_string_actions, *get_args_parser()._option_string_actions]
    for word in (word for word in left if word.startswith("--")):
        if not any(option.startswith(word.partition("=")[0]) for option in known):  # Hydra would print its usage
            raise SettingError(no_option(word, known, beside_settings=True))
    card = given.card and given.card.lower()
    named = {"--card": card, "--share": given.share, "--measure": given.measure or None}
    if not given.dry_run and (alone := [name for name, value in named.items() if value is not None]):
        raise SettingError(f"{alone[0]} is given without --dry-run, which it belongs to; add that, or leave it out")
    if card is not None and card not in cards.typed():
        raise SettingError(f"--card is {given.card}; {nearest(card, cards.typed())}")
    if given.share is not None and not (0 < given.share <= 1 and card):
        raise SettingError(f"--share is {given.share:g}; allowed: above 0, up to 1, a share of the peak of a --card")
    if card and given.measure:
        raise SettingError("--measure and --card both say the hours; allowed: one of them")
    return Options(given.dry_run, OnCard(card, given.share or SHARE) if card else None, given.measure), left


def base_of_a_sweep(words: Sequence[str]) -> str | None:
    """Return what to say if `--cfg` is to print a sweep, of which it prints the settings without any job's own."""
    sweep = next((word for word in words if word.startswith("sweeps=") and word != "sweeps=null"), None)
    if sweep is None or not any(word in ("-c", "--cfg") or word.startswith("--cfg=") for word in words):
        return None
    return f"--cfg prints what {sweep} starts from, without the settings of its jobs; --dry-run lists the jobs"


@dataclass(frozen=True)
class _Planned:
    """A job that is not run."""

    words: Sequence[str]  # its overrides
    settings: Settings
    identity: Identity

    def state(self) -> str:
        """How far the job is, by its record."""
        found = Record(self.identity.directory).status
        return {None: "to do", "finished": "done"}.get(found, str(found))


class DryRun:
    """The task function that Hydra calls in the place of `jobs.Jobs`; the sweeper adds the jobs of a sweep."""

    def __init__(self, options: Options, stop: Stop) -> None:
        self._options, self.stop, self.code = options, stop, DONE
        self._planned: list[_Planned] = []
        self._is_sweep, self._text = False, ""

    def __call__(self, composed: DictConfig) -> None:
        """Plan a single run."""
        hydra_config = HydraConfig.get()
        words = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        try:
            self._add(words, composed, hydra_config.runtime.choices)
        except SettingError as error:  # Hydra would add lines of its own
            self.code = jobs.ended(error, self.stop, is_alike=True).code

    def plan(self, words: Sequence[str], composed: DictConfig, choices: Mapping[str, str]) -> None:
        """Plan a job of a sweep.

        Raises:
            SettingError: a wrong setting.
        """
        self._is_sweep = True
        self._add(words, composed, choices)

    def _add(self, words: Sequence[str], composed: DictConfig, choices: Mapping[str, str]) -> None:
        settings = check(composed, choices)
        self._planned.append(_Planned(words, settings, identify(settings, choices)))

    def print(self) -> None:
        """Print what was worked out."""
        sys.stdout.write(hidden(self._text))

    def work_out(self) -> None:
        """Work out the costs of all jobs; a process that torchrun started beside the first has nothing to do."""
        if not (self._planned and ranks.is_first()):
            return
        threads.wait_asleep()
        counter = Counter(self._options.on, self._options.measure)
        common = set.intersection(*(set(planned.words) for planned in self._planned))
        rows = []
        for planned in self._planned:
            name = " ".join(word for word in planned.words if word not in common)
            record = planned.identity.directory
            rows.append(Row(name, planned.settings, planned.state(), str(record), counter.costs(planned.settings)))
        hours = self._hours(counter)
        self._text = of_sweep(rows, hours) if self._is_sweep else of_one(rows[0], hours)

    def _hours(self, counter: Counter) -> list[str]:
        """Say where the hours come from."""
        on, without = self._options.on, "checkpoints, compiling, preparing the text"
        if on is not None:
            peaks = {cards.peak_flops(cards.typed()[on.card], job.settings.trainer.precision) for job in self._planned}
            of = " or ".join(f"{peak / 1e12:g}" for peak in sorted(peaks - {None}))
            return [
                f"hours: of one {on.card} at {on.share:g} of its datasheet's {of or 'no'} TFLOP/s, with what recompute",
                f"repeats; not in them: the optimizer's own work, refreshes, {without}.",
            ]
        measured = [found for found in counter.measured.values() if not isinstance(found, str)]
        if measured:
            made = ", ".join(sorted({f"{found.steps} steps on {found.device}" for found in measured}))
            by = ", ".join(f"{found.arm} {found.step:.3g}" for found in measured)
            return [f"hours: by {made}; seconds of a step: {by};", f"not in them: {without}."]
        return [] if self._options.measure else ["hours: add --card h100, or another, or --measure on this machine."]
