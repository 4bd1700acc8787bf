"""Find the runs that a command of train.py would make, identified by their settings."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.reports.descent import RATES
from adafrugal.settings import REPOSITORY, compose
from adafrugal.settings.explain import explain
from adafrugal.settings.identity import differing, still_part
from adafrugal.settings.naming import shown
from adafrugal.settings.repositories import is_path
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

ARMS = ("experiments", "optimizer")  # what names a row's arm, where a command sweeps it


@dataclass(frozen=True)
class Job:
    """The runs of one row of a table; they differ only in their seed."""

    name: str  # unique in the section
    command: str  # to make one of its runs, without the seed
    seeds: tuple[int, ...]  # wanted
    key: str  # `settings_key` of its settings
    arm: str  # its experiment's name, or its optimizer's
    rates: Mapping[str, float]  # those of RATES that its optimizer has
    settings: Settings  # of one of its runs
    data: str  # the file of conf/data
    swept: Mapping[str, str] = field(default_factory=dict)  # settings of several values in its command -> its own
    runs: Mapping[int, Record] = field(default_factory=dict)  # seed -> finished run
    diverged: tuple[int, ...] = ()  # seeds whose run failed with a NaN or infinite loss

    @property
    def missing(self) -> tuple[int, ...]:
        """Seeds with neither a finished nor a diverged run."""
        return tuple(seed for seed in self.seeds if seed not in self.runs and seed not in self.diverged)

    def numbers(self, key: str) -> list[Any]:
        """Return the entry `key` of each run's summary."""
        return [run.summary()[key] for run in self.runs.values()]

    def at(self, rates: Mapping[str, float], seeds: tuple[int, ...]) -> Job:
        """Return the job, without runs, at other rates."""
        values = {name.partition(".")[2]: rate for name, rate in rates.items()}
        settings = replace(self.settings, optimizer=replace(self.settings.optimizer, **values))
        kept = [word for word in shlex.split(self.command) if word.partition("=")[0] not in rates]
        command = shlex.join([*kept, *(f"{name}={rate:g}" for name, rate in rates.items())])
        key = settings_key(differing(settings), self.data)
        return Job(self.name, command, seeds, key, self.arm, _rates(settings), settings, self.data, self.swept)


def jobs(commands: Sequence[str]) -> list[Job]:
    """Return the jobs of some commands, without runs; a job in two commands has the seeds of both.

    A name that two commands give, such as `steps=200`, is preceded by the arm's.

    Raises:
        SettingError: a command that train.py would refuse.
    """
    found: dict[str, Job] = {}
    for command in commands:
        for job in _jobs_of(command):
            known = found.get(job.key, job)
            found[job.key] = replace(known, seeds=tuple(dict.fromkeys([*known.seeds, *job.seeds])))
    names = Counter(job.name for job in found.values())
    return [replace(job, name=f"{job.arm} {job.name}") if names[job.name] > 1 else job for job in found.values()]


def _jobs_of(command: str) -> list[Job]:
    """Return a job for each combination of the swept values."""
    fixed, values = _words(command)
    seeds = values.pop("seed", ["0"])
    if not all(seed.isdecimal() for seed in seeds):
        raise SettingError(f"seed is {','.join(seeds)}; allowed: whole numbers with commas between them")
    found = []
    for combination in itertools.product(*values.values()):
        swept = dict(zip(values, combination, strict=True))
        words = [*fixed, *(f"{name}={value}" for name, value in swept.items())]
        composed, choices = compose_once(words)
        settings = compose.check(composed, choices, to_run=False)
        arm = (choices.get("experiments") or settings.arm).rpartition("/")[2]
        varied = {name: value for name, value in swept.items() if len(values[name]) > 1}
        command = shlex.join(sorted(words, key=lambda word: not word.startswith("experiments=")))
        key = settings_key(differing(settings), choices["data"])
        of_job = arm, _rates(settings), settings, choices["data"], varied
        found.append(Job(row_name(varied) or arm, command, tuple(map(int, seeds)), key, *of_job))
    return found


def _words(command: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the words common to all jobs of a command, and the swept values by name; expand `sweeps=`."""
    try:
        words = [word for word in shlex.split(command) if word != "-m"]
    except ValueError as error:
        raise SettingError(f"commands: a quote is not closed in {command!r}; close it") from error
    if "train.py" in words:
        raise SettingError(f"commands: {command!r} names train.py; allowed: the words after it, such as seed=0,1")
    several = [word for word in words if word.startswith("seed=") or _is_swept(word)]
    swept = dict(word.split("=", 1) for word in several)
    typed = {word.split("=", 1)[0]: word for word in words if word not in several}
    if sweep := typed.pop("sweeps", None):
        _, choices, hydra = _composed((sweep,))
        swept = {name: given for name, given in hydra.sweeper.params.items() if name not in typed} | swept
        if choices.get("scale") and "scale" not in typed:
            swept["scale"] = choices["scale"]
    return list(typed.values()), {name: [v.strip() for v in str(given).split(",")] for name, given in swept.items()}


def _is_swept(word: str) -> bool:
    return "," in word and not set("[{") & set(word)


def as_typed(command: str) -> str:
    """Return a command as train.py takes it: with -m, if it sweeps values and no file of sweeps/ says so."""
    words = shlex.split(command)
    is_said = "-m" in words or any(word.startswith("sweeps=") for word in words)
    return command if is_said or not any(map(_is_swept, words)) else f"-m {command}"


def compose_once(words: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """Compose words as train.py does; words that select the same files share the slow reading of those files."""
    groups = {"experiments", "sweeps"}
    files = [word for word in words if (name := word.split("=")[0]) in groups or (REPOSITORY / "conf" / name).is_dir()]
    base, choices, _ = _composed(tuple(sorted(files)))
    composed = copy.deepcopy(base)
    try:
        values = OverridesParser.create().parse_overrides([word for word in words if word not in files])
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)  # as Hydra itself does
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(explain(error)) from error
    return composed, choices


_composed = functools.cache(compose.composed)


def _rates(settings: Settings) -> dict[str, float]:
    """Return the optimizer's rates; c only if it has a state-free rule."""
    o = settings.optimizer
    names = RATES[:2] if getattr(o, "state_free", "none") == "none" else RATES
    found = {name: getattr(o, name.partition(".")[2], None) for name in names}
    return {name: float(rate) for name, rate in found.items() if rate is not None}


def row_name(varied: Mapping[str, str]) -> str:
    """Return a row's name: an experiment or optimizer by its file's name, another setting as short name=value."""
    files = [value.rpartition("/")[2] for name, value in varied.items() if name in ARMS]
    others = shown({name: value for name, value in varied.items() if name not in ARMS})
    return " ".join([*files, *([others] if others else [])])


def settings_key(differs: Mapping[str, Any], data: str) -> str:
    """Return the settings of a row as text to compare, without seed, log_every and the paths of local copies.

    Args:
        differs: the settings that differ from the schema's defaults, as in a record.
        data: name of the file of conf/data.
    """
    kept = {name: value for name, value in still_part(differs).items() if name not in ("seed", "trainer.log_every")}
    if "data.source" in kept:
        file = REPOSITORY / "conf" / "data" / f"{data}.yaml"
        own = OmegaConf.load(file).get("source") if file.exists() else None
        kept["data.source"] = own if kept["data.source"] == own else "a copy"
    if kept.get("model.kind") == "encoder" and "model.name" in kept and is_path(kept["model.name"]):
        kept["model.name"] = Path(kept["model.name"]).name  # what it holds is in the data's fingerprint
    # integers become floats, because JSON from W&B does not distinguish 1 and 1.0
    return json.dumps(json.loads(json.dumps(kept), parse_int=float), sort_keys=True)
