"""The runs that a command of train.py makes, known by their settings before any of them is made.

A command is composed as train.py does it, so that its runs can be found among records, and those that are missing can
be said with a command for each.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.settings import compose
from adafrugal.settings.compose import check
from adafrugal.settings.explain import explain
from adafrugal.settings.identity import differing, still_part
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

RATES = ("optimizer.lr", "optimizer.split_lr_scale", "optimizer.state_free_lr_scale")
SHORT = {  # how a setting is called in a row's name
    "optimizer.lr": "lr", "optimizer.split_lr_scale": "s", "optimizer.state_free_lr_scale": "c",
    "optimizer.density": "ρ", "optimizer.interval": "T", "optimizer.density.end": "ρ_end",
    "optimizer.density.steps": "K", "optimizer.interval.threshold": "τ", "optimizer.interval.factor": "γ",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The runs that differ in their seed alone.

    Args:
        name: what tells it from the section's other jobs.
        command: what makes one of them, but for the seed.
        seeds: that are wanted.
        key: their settings, in a form that compares.
        arm: its experiment, or its optimizer where it has none.
        rates: the optimizer's, those that it has.
        runs: seed -> the finished run.
        diverged: seeds of which the run ended with a loss that is no number.
    """

    name: str
    command: str
    seeds: tuple[int, ...]
    key: str
    arm: str
    rates: Mapping[str, float]
    runs: Mapping[int, Record] = field(default_factory=dict)
    diverged: tuple[int, ...] = ()

    @property
    def missing(self) -> tuple[int, ...]:
        """The seeds of which there is no run that came to its end, or to no number."""
        return tuple(seed for seed in self.seeds if seed not in self.runs and seed not in self.diverged)


def jobs(commands: Sequence[str]) -> list[Job]:
    """The jobs of some commands, with no runs yet; one that two commands share has the seeds of both.

    Raises:
        SettingError: a command that train.py would refuse.
    """
    found: dict[str, Job] = {}
    for command in commands:
        for job in _jobs_of(command):
            known = found.get(job.key, job)
            found[job.key] = replace(known, seeds=tuple(dict.fromkeys([*known.seeds, *job.seeds])))
    return list(found.values())


def _jobs_of(command: str) -> list[Job]:
    """A command's jobs: the product of the values in its own words and in the sweep that it names."""
    fixed, values = _words(command)
    seeds = values.pop("seed", ["0"])
    if not all(seed.isdecimal() for seed in seeds):
        raise SettingError(f"seed is {','.join(seeds)}; allowed: whole numbers with commas between them")
    varied = {name for name in values if len(values[name]) > 1}
    combinations = (dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values()))
    return [_job(fixed, swept, varied, tuple(map(int, seeds))) for swept in combinations]


def _job(fixed: Sequence[str], swept: Mapping[str, str], varied: set[str], seeds: tuple[int, ...]) -> Job:
    words = [*fixed, *(f"{name}={value}" for name, value in swept.items())]
    composed, choices = _composed(words)
    settings = check(composed, choices, to_run=False)
    arm = (choices.get("experiments") or settings.arm).rpartition("/")[2]
    own = {name: value for name, value in swept.items() if name in varied}
    key = settings_key(differing(settings), choices["data"])
    return Job(_name(own) or arm, _once(words, choices), seeds, key, arm, _rates(settings))


def _once(words: Sequence[str], choices: Mapping[str, str]) -> str:
    """As it is typed without its sweep, whose own choice of a scale has to be typed then."""
    typed = {word.split("=", 1)[0]: word for word in words if not word.startswith("sweeps=")}
    typed |= {"scale": f"scale={choices['scale']}"} if choices.get("scale") else {}
    return shlex.join(sorted(typed.values(), key=lambda word: not word.startswith("experiments=")))


def _rates(settings: Settings) -> dict[str, float]:
    """Those that the optimizer has; c only where something is state-free."""
    o = settings.optimizer
    found = {name: getattr(o, name.partition(".")[2], None) for name in RATES}
    if getattr(o, "state_free", "none") == "none":
        found[RATES[2]] = None
    return {name: float(rate) for name, rate in found.items() if rate is not None}


def _words(command: str) -> tuple[list[str], dict[str, list[str]]]:
    """A command's words that all its jobs have, and the names that are swept with their values."""
    words = [word for word in shlex.split(command) if word != "-m"]
    several = [word for word in words if word.startswith("seed=") or ("," in word and not set("[{") & set(word))]
    swept = dict(word.split("=", 1) for word in several)
    fixed = [word for word in words if word.split("=", 1)[0] not in swept]
    if any(word.startswith("sweeps=") for word in fixed):
        _, _, hydra = compose.composed(fixed)
        typed = {word.split("=", 1)[0] for word in fixed}
        swept = {name: given for name, given in hydra.sweeper.params.items() if name not in typed} | swept
    return fixed, {name: [value.strip() for value in str(given).split(",")] for name, given in swept.items()}


def _composed(words: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """What train.py's words compose. Files are read once for all jobs that choose the same: that is what takes time."""
    files = tuple(word for word in words if (compose.REPOSITORY / "conf" / word.split("=")[0]).is_dir()
                  or word.startswith(("experiments=", "sweeps=")))  # fmt: skip
    base, choices = _chosen(files)
    composed = copy.deepcopy(base)
    parser = OverridesParser.create()
    try:
        for word in words:
            if word not in files:
                (given,) = parser.parse_overrides([word])
                OmegaConf.update(composed, given.key_or_group, given.value(), merge=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(explain(error)) from error
    return composed, choices


@functools.cache
def _chosen(files: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    composed, choices, _ = compose.composed(files)
    return composed, choices


def _name(varied: Mapping[str, str]) -> str:
    """Of an experiment its file's name, of any other setting its short name and its value."""
    parts = (
        value.rpartition("/")[2]
        if name in ("experiments", "optimizer")
        else f"{SHORT.get(name, name.rpartition('.')[2])}={_said(value)}"
        for name, value in varied.items()
    )
    return " ".join(parts)


def _said(value: str) -> str:
    return "all" if value == "null" else value  # of a decay's length: the run's


def settings_key(differs: Mapping[str, Any], data: str) -> str:
    """Settings without what makes no difference in a row; a copy of a data set is a copy, wherever it lies.

    Args:
        differs: the settings that differ from the schema's defaults, as records have them.
        data: the settings' file of the data.
    """
    kept = still_part(differs)
    kept = {name: _number(value) for name, value in kept.items() if name not in ("seed", "trainer.log_every")}
    if "data.source" in kept:
        file = compose.REPOSITORY / "conf" / "data" / f"{data}.yaml"
        own = OmegaConf.load(file).get("source") if file.exists() else None
        kept["data.source"] = own if kept["data.source"] == own else "a copy"
    return json.dumps(kept, sort_keys=True)


def _number(value: Any) -> Any:
    """1 and 1.0 are one number: JSON on its way through W&B does not tell them apart."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
