"""What a table is to hold: the runs that its command makes, known by their settings before any of them is made.

A page of `experiments/tables` names sections, a section names commands of train.py. A command is composed as train.py
does it, so that a cell holds runs of exactly these settings, and what is missing can be said with the command for it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from adafrugal import checks, composition
from adafrugal.config import SettingError
from adafrugal.identity import differing
from adafrugal.tracking.record import Record

TABLES = composition.REPOSITORY / "experiments" / "tables"
RATES = ("optimizer.lr", "optimizer.split_lr_scale", "optimizer.state_free_lr_scale")
SHORT = {  # how a setting is called in a row's name
    "optimizer.lr": "lr", "optimizer.split_lr_scale": "s", "optimizer.state_free_lr_scale": "c",
    "optimizer.density": "ρ", "optimizer.interval": "T", "optimizer.density.end": "ρ_end",
    "optimizer.density.steps": "K", "optimizer.interval.threshold": "τ", "optimizer.interval.factor": "γ",
    "optimizer.subspace": "subspace", "optimizer": "optimizer", "experiments": "experiments",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The runs that differ in their seed alone.

    Args:
        name: what tells it from the section's other jobs.
        varied: the swept settings, without the seed.
        command: what makes one of them, but for the seed.
        seeds: that are wanted.
        key: their settings, in a form that compares.
        runs: seed -> the finished run.
        arm: its experiment, or its optimizer where it has none.
        rates: the optimizer's rates.
    """

    name: str
    varied: Mapping[str, str]
    command: str
    seeds: tuple[int, ...]
    key: str
    arm: str
    rates: Mapping[str, float]
    runs: Mapping[int, Record] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[int, ...]:
        """The seeds of which there is no finished run."""
        return tuple(seed for seed in self.seeds if seed not in self.runs)


@dataclass(frozen=True)
class Section:
    """A table of a page.

    Args:
        name: in file names.
        title: above it.
        commands: that make its runs, without `python train.py`.
        note: a sentence or two below the title.
        kind: how it is laid out: comparison, search or scores.
        reference: the job that the others are compared with.
        published: columns of `experiments/published` beside ours, as file/column.
        pictures: which are drawn.
        claims: which are judged on it.
        jobs: one a row.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    note: str = ""
    kind: str = "comparison"
    reference: str | None = "adamw"
    published: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Page:
    """A page of tables.

    Args:
        name: its directory.
        place: among the pages.
        title: of it.
        about: a paragraph.
        command: what makes its table at the papers' scale.
        sections: its tables.
    """

    name: str
    place: int
    title: str
    about: str
    command: str
    sections: tuple[Section, ...]


def pages(directory: Path = TABLES) -> list[Page]:
    """The pages that are described in a directory, in their order, with no runs yet.

    Raises:
        SettingError: a page has a key that it should not have, or a command that train.py would refuse.
    """
    files = [file for file in sorted(directory.glob("*.yaml")) if not file.stem.startswith("_")]
    return sorted((_page(file) for file in files), key=lambda page: page.place)


def filled(pages: Sequence[Page], records: Iterable[Record]) -> list[Page]:
    """The pages with the finished runs that belong to them."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        environment = record.environment()
        if record.status == "finished" and environment and record.summary():
            identity = environment["identity"]
            key = _key(identity["differs"], identity["labels"]["data"])
            found.setdefault(key, {}).setdefault(identity["labels"]["seed"], record)
    return [replace(page, sections=tuple(_filled(section, found) for section in page.sections)) for page in pages]


def _filled(section: Section, found: Mapping[str, Mapping[int, Record]]) -> Section:
    jobs = (
        replace(job, runs={seed: run for seed, run in sorted(found.get(job.key, {}).items()) if seed in job.seeds})
        for job in section.jobs
    )
    return replace(section, jobs=tuple(jobs))


def _page(file: Path) -> Page:
    given = dict(OmegaConf.to_container(OmegaConf.load(file)))
    try:
        sections = [Section(**{k: tuple(v) if isinstance(v, list) else v for k, v in s.items()})
                    for s in given.pop("sections")]  # fmt: skip
        sections = [replace(section, jobs=tuple(jobs(section.commands))) for section in sections]
        return Page(name=file.stem, sections=tuple(sections), **given)
    except TypeError as error:
        raise SettingError(f"{file}: {error}") from error


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
    seeds = tuple(int(seed) for seed in values.pop("seed", ["0"]))
    found = []
    for combination in itertools.product(*values.values()):
        job = dict(zip(values, combination, strict=True))
        overrides = [f"{name}={value}" for name, value in job.items()]
        composed, choices = _composed([*fixed, *overrides])
        settings = checks.check(composed, choices, to_run=False)
        varied = {name: value for name, value in job.items() if len(values[name]) > 1}
        # as it is typed without its sweep, whose own choice of a scale has to be typed then
        typed = {word.split("=", 1)[0]: word for word in [*overrides, *fixed] if not word.startswith("sweeps=")}
        typed |= {"scale": f"scale={choices['scale']}"} if choices.get("scale") else {}
        once = sorted(typed.values(), key=lambda word: not word.startswith("experiments="))
        key = _key(differing(settings), choices["data"])
        rates = {name: getattr(settings.optimizer, name.partition(".")[2], 1.0) for name in RATES}
        arm = (choices.get("experiments") or settings.arm).rpartition("/")[2]
        found.append(Job(_name(varied) or arm, varied, shlex.join(once), seeds, key, arm, rates))
    return found


def _words(command: str) -> tuple[list[str], dict[str, list[str]]]:
    """A command's words that all its jobs have, and the names that are swept with their values."""
    words = [word for word in shlex.split(command) if word != "-m"]
    several = [word for word in words if word.startswith("seed=") or ("," in word and not set("[{") & set(word))]
    swept = dict(word.split("=", 1) for word in several)
    fixed = [word for word in words if word.split("=", 1)[0] not in swept]
    if any(word.startswith("sweeps=") for word in fixed):
        _, _, hydra = composition.composed(fixed)
        swept = dict(hydra.sweeper.params) | swept
    return fixed, {name: [value.strip() for value in str(given).split(",")] for name, given in swept.items()}


def _composed(words: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """What train.py's words compose. Files are read once for all jobs that choose the same: that is what takes time."""
    files = tuple(word for word in words if (composition.REPOSITORY / "conf" / word.split("=")[0]).is_dir()
                  or word.startswith(("experiments=", "sweeps=")))  # fmt: skip
    base, choices = _chosen(files)
    composed = copy.deepcopy(base)
    parser = OverridesParser.create()
    for word in words:
        if word not in files:
            given = parser.parse_override(word)
            OmegaConf.update(composed, given.key_or_group, given.value(), merge=True)
    return composed, choices


@functools.cache
def _chosen(files: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    composed, choices, _ = composition.composed(files)
    return composed, choices


def _name(varied: Mapping[str, str]) -> str:
    """Of an experiment its file's name, of any other setting its short name and its value."""
    parts = (
        value.rpartition("/")[2] if name in ("experiments", "optimizer") else f"{SHORT.get(name, name)}={value}"
        for name, value in varied.items()
    )
    return " ".join(parts)


def _key(differs: Mapping[str, Any], data: str) -> str:
    """Settings without what makes no difference in a row; a copy of a data set is a copy, wherever it lies."""
    kept = {name: value for name, value in differs.items() if name not in ("seed", "trainer.log_every")}
    if "data.source" in kept:
        file = composition.REPOSITORY / "conf" / "data" / f"{data}.yaml"
        own = OmegaConf.load(file).get("source") if file.exists() else None
        kept["data.source"] = own if kept["data.source"] == own else "a copy"
    return json.dumps(kept, sort_keys=True)
