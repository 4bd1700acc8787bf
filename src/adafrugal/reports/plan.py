"""The pages of tables, as `experiments/tables` describes them, and the runs that belong to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal import composition
from adafrugal.config import SettingError
from adafrugal.possible import nearest
from adafrugal.reports.jobs import Job, jobs, settings_key
from adafrugal.reports.rows import label
from adafrugal.tracking.record import Record

TABLES = composition.REPOSITORY / "experiments" / "tables"


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
        text: how the fingerprint of its data begins; where it is not said, most of its runs say it.
        published: columns of `experiments/published` beside ours, as file/column.
        pictures: which are drawn.
        claims: which are judged on it.
        jobs: one a row.
        others: runs with its settings that are not in it, since they read other data, or are there already.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    note: str = ""
    kind: str = "comparison"
    reference: str | None = "adamw"
    text: str | None = None
    published: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    jobs: tuple[Job, ...] = ()
    others: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Page:
    """A page of tables.

    Args:
        name: its directory.
        place: among the pages.
        title: of it.
        about: what it is about, in paragraphs.
        commands: that make its table at the papers' scale.
        sections: its tables.
    """

    name: str
    place: int
    title: str
    about: str
    commands: tuple[str, ...]
    sections: tuple[Section, ...]


def pages(directory: Path = TABLES) -> list[Page]:
    """The pages that are described in a directory, in their order, with no runs yet.

    Raises:
        SettingError: a page's file is not as it should be, or has a command that train.py would refuse.
    """
    return sorted((_page(file) for file in sorted(directory.glob("*.yaml"))), key=lambda page: page.place)


def _page(file: Path) -> Page:
    try:
        given = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise SettingError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    page = _typed(Page, {"name": file.stem} | (given if isinstance(given, dict) else {}), str(file))
    sections = []
    for number, each in enumerate(page.sections):
        section = _typed(Section, each if isinstance(each, dict) else {}, f"{file}, section {number + 1}")
        try:
            sections.append(replace(section, jobs=tuple(jobs(section.commands))))
        except SettingError as error:
            raise SettingError(f"{file}, section {section.name}: {error}") from error
        _refuse_unclear(sections[-1], f"{file}, section {section.name}")
    if twice := [name for name, count in Counter(section.name for section in sections).items() if count > 1]:
        raise SettingError(f"{file}: {len(sections)} sections, of which two are called {twice[0]}")
    return replace(page, sections=tuple(sections))


def _typed(kind: type, given: dict[str, Any], where: str) -> Any:
    """A page or a section of what its file says, of which each name and its type have to be right."""
    known = {f.name: str(f.type) for f in fields(kind) if f.name not in ("jobs", "others")}
    needed = {f.name for f in fields(kind) if str(f.default).startswith("<dataclasses._MISSING")}
    for name in given.keys() - known.keys():
        raise SettingError(f"{where} has {name!r}; {nearest(name, known)}")
    for name in sorted(needed - given.keys()):
        raise SettingError(f"{where} lacks {name!r}")
    for name, value in given.items():
        wanted = list if known[name].startswith("tuple") else int if known[name] == "int" else str
        if not isinstance(value, wanted) and not (value is None and "None" in known[name]):
            raise SettingError(f"{where}: {name} is {value!r}; allowed: a {wanted.__name__}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _refuse_unclear(section: Section, where: str) -> None:
    """Two rows of one name, or a reference that is no row."""
    names = [job.name for job in section.jobs]
    if len(set(names)) < len(names):
        raise SettingError(f"{where}: two of its rows would be called the same, among {', '.join(names)}")
    is_compared = section.kind == "comparison" and section.reference is not None
    if is_compared and section.reference not in names:
        raise SettingError(f"{where}: reference is {section.reference!r}; {nearest(str(section.reference), names)}")


def filled(pages: Sequence[Page], records: Iterable[Record]) -> list[Page]:
    """The pages with the runs that belong to them."""
    found: dict[str, list[Record]] = {}
    for record in records:
        identity = (record.environment() or {}).get("identity")
        if identity and (record.status == "finished" or _has_diverged(record)):
            found.setdefault(settings_key(identity["differs"], identity["labels"]["data"]), []).append(record)
    return [replace(page, sections=tuple(_filled(section, found) for section in page.sections)) for page in pages]


def _filled(section: Section, found: dict[str, list[Record]]) -> Section:
    """One run a seed: of the section's text, the first in the order of names."""
    wanted = [(job, run) for job in section.jobs for run in found.get(job.key, []) if _seed(run) in job.seeds]
    texts: dict[str, Counter[str]] = {}
    for _, run in wanted:
        texts.setdefault(label(run, "data"), Counter())[_text(run)] += 1
    usual = {data: counted.most_common(1)[0][0] for data, counted in texts.items()}
    runs: dict[str, dict[int, Record]] = {job.name: {} for job in section.jobs}
    others = []
    for job, run in wanted:
        is_its = _text(run).startswith(section.text or usual[label(run, "data")])
        if is_its and _seed(run) not in runs[job.name]:
            runs[job.name][_seed(run)] = run
        else:
            others.append(run)
    filled = (_with_runs(job, dict(sorted(runs[job.name].items()))) for job in section.jobs)
    return replace(section, jobs=tuple(filled), others=tuple(others))


def _with_runs(job: Job, runs: dict[int, Record]) -> Job:
    finished = {seed: run for seed, run in runs.items() if run.status == "finished"}
    return replace(job, runs=finished, diverged=tuple(seed for seed in runs if seed not in finished))


def _has_diverged(record: Record) -> bool:
    """Whether it failed since a loss was no number."""
    return record.status == "failed" and any(f"loss is {word}" in record.reason for word in ("nan", "inf"))


def _seed(record: Record) -> int:
    return int(label(record, "seed"))


def _text(record: Record) -> str:
    return str(record.environment()["data"]["fingerprint"])
