"""The pages of tables, as `experiments/tables` describes them, and the runs that belong to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.reports.arms import Job, jobs, settings_key
from adafrugal.reports.selection import label
from adafrugal.settings import compose
from adafrugal.settings.explain import explain, nearest
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

TABLES = compose.REPOSITORY / "experiments" / "tables"


@dataclass
class SectionFile:
    """What a page's file says of one of its tables.

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
    """

    name: str = MISSING
    title: str = MISSING
    commands: list[str] = MISSING
    note: str = ""
    kind: str = "comparison"
    reference: str | None = "adamw"
    text: str | None = None
    published: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)


@dataclass
class PageFile:
    """A file of `experiments/tables`.

    Args:
        place: among the pages.
        title: of it.
        about: what it is about, in paragraphs.
        commands: that make its table at the papers' scale.
        sections: its tables.
    """

    place: int = MISSING
    title: str = MISSING
    about: str = MISSING
    commands: list[str] = MISSING
    sections: list[SectionFile] = MISSING


@dataclass
class Section(SectionFile):
    """A table of a page.

    Args:
        jobs: one a row.
        others: runs with its settings that are not in it, since they read other data, or are there already.
    """

    jobs: Sequence[Job] = ()
    others: Sequence[Record] = ()

    @property
    def runs(self) -> list[Record]:
        """The finished runs of all jobs."""
        return [run for job in self.jobs for run in job.runs.values()]


@dataclass
class Page:
    """A page of tables.

    Args:
        name: its directory.
        file: what its file says.
        sections: its tables.
    """

    name: str
    file: PageFile
    sections: Sequence[Section]


def pages(directory: Path = TABLES) -> list[Page]:
    """The pages that are described in a directory, in their order, with no runs yet.

    Raises:
        SettingError: a page's file is not as it should be, or has a command that train.py would refuse.
    """
    return sorted((_page(file) for file in sorted(directory.glob("*.yaml"))), key=lambda page: page.file.place)


def _page(path: Path) -> Page:
    try:
        file: PageFile = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PageFile), OmegaConf.load(path)))
    except yaml.YAMLError as error:
        raise SettingError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise SettingError(f"{path}: {explain(error)}") from error
    names = [section.name for section in file.sections]
    if len(set(names)) < len(names):
        raise SettingError(f"{path}: two sections are called the same, among {', '.join(names)}")
    return Page(path.stem, file, [_section(section, path) for section in file.sections])


def _section(file: SectionFile, path: Path) -> Section:
    """A section with its jobs, which have names that differ, and one of which is its reference."""
    where = f"{path}, section {file.name}"
    try:
        section = Section(**vars(file), jobs=jobs(file.commands))
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error
    names = [job.name for job in section.jobs]
    if len(set(names)) < len(names):
        raise SettingError(f"{where}: two of its rows would be called the same, among {', '.join(names)}")
    is_compared = section.kind == "comparison" and section.reference is not None
    if is_compared and section.reference not in names:
        raise SettingError(f"{where}: reference is {section.reference!r}; {nearest(str(section.reference), names)}")
    return section


def filled(pages: Sequence[Page], records: Iterable[Record]) -> list[Page]:
    """The pages with the runs that belong to them."""
    found: dict[str, list[Record]] = {}
    for record in records:
        identity = (record.environment() or {}).get("identity")
        if identity and (record.status == "finished" or _has_diverged(record)):
            found.setdefault(settings_key(identity["differs"], identity["labels"]["data"]), []).append(record)
    return [replace(page, sections=[_filled(section, found) for section in page.sections]) for page in pages]


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
    return replace(section, jobs=list(filled), others=others)


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
