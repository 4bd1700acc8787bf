"""Read the pages of tables from `experiments/tables`, and find the runs that belong to each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafrugal.reports import lengths
from adafrugal.reports.arms import Job, jobs, settings_key
from adafrugal.reports.searches import Search, SearchFile, search
from adafrugal.settings import REPOSITORY
from adafrugal.settings.explain import explain, nearest
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

TABLES = REPOSITORY / "experiments" / "tables"


@dataclass
class SectionFile:
    """A table of a page, as its file describes it."""

    name: str = MISSING  # in file names
    title: str = MISSING
    commands: list[str] = MISSING  # to make its runs, without `python train.py`
    note: str = ""  # below the title
    kind: str = "comparison"  # the layout: comparison, search, scores or lengths
    reference: str | None = "adamw"  # the row to compare the others with
    decisions: list[str] = field(default_factory=list)  # rows to test the others against, with a table for each
    search: SearchFile | None = None  # of each arm's rates; its rows are the arms at the best of them
    text: str | None = None  # start of the data's fingerprint; null: the most common one of its runs
    published: list[str] = field(default_factory=list)  # columns of `experiments/published`, as file/column
    pictures: list[str] = field(default_factory=list)  # names of `pictures.DRAWN`
    claims: list[str] = field(default_factory=list)  # names of `claims.CLAIMS`


@dataclass
class PageFile:
    """A file of `experiments/tables`."""

    place: int = MISSING  # order among the pages
    title: str = MISSING
    about: str = MISSING  # paragraphs below the title
    commands: list[str] = MISSING  # to make the papers' table
    sections: list[SectionFile] = MISSING


@dataclass
class Section(SectionFile):
    """A table with its rows."""

    jobs: Sequence[Job] = ()
    others: Sequence[Record] = ()  # runs of its settings left out: of another text, or duplicates
    searches: Sequence[Search] = ()  # of the arms, as far as their runs go

    @property
    def runs(self) -> list[Record]:
        """The finished runs of all jobs."""
        return [run for job in self.jobs for run in job.runs.values()]


@dataclass
class Page:
    """A page of tables; `name` is its directory."""

    name: str
    file: PageFile
    sections: Sequence[Section]


def pages(directory: Path = TABLES) -> list[Page]:
    """Return the pages that a directory describes, in their order, without runs.

    Raises:
        SettingError: an invalid page file, or a command in it that train.py would refuse.
    """
    return sorted((_page(file) for file in sorted(directory.glob("*.yaml"))), key=lambda page: page.file.place)


def _page(path: Path) -> Page:
    try:
        file: PageFile = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PageFile), OmegaConf.load(path)))
    except yaml.YAMLError as error:
        raise SettingError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise SettingError(f"{path}: {explain(error)}") from error
    _refuse_doubles([section.name for section in file.sections], f"{path}: two sections")
    return Page(path.stem, file, [_section(section, path) for section in file.sections])


def _section(file: SectionFile, path: Path) -> Section:
    where = f"{path}, section {file.name}"
    try:
        section = Section(**vars(file), jobs=jobs(file.commands))
        names = [job.name for job in section.jobs]
        rows = list(lengths.arms(section.jobs)) if section.kind == "lengths" else names
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error
    _refuse_doubles(names, f"{where}: two rows")
    is_compared = section.kind == "lengths" or (section.kind == "comparison" and section.reference is not None)
    if is_compared and section.reference not in rows:
        raise SettingError(f"{where}: reference is {section.reference!r}; {nearest(str(section.reference), rows)}")
    if section.search and not section.text:
        raise SettingError(f"{where}: search needs text, the start of a fingerprint, since two do not compare")
    if section.decisions and section.kind == "scores":
        raise SettingError(f"{where}: decisions are of validation losses; kind scores has none, so leave them out")
    for name in section.decisions:
        if name not in names:
            raise SettingError(f"{where}: decisions has no {name!r}; {nearest(name, names)}")
    return section


def _refuse_doubles(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        raise SettingError(f"{what} have the same name, among {', '.join(names)}")


def filled(pages: Sequence[Page], records: Iterable[Record]) -> list[Page]:
    """Return the pages with the runs that belong to them: finished ones, and those whose loss diverged."""
    found = by_settings(records)
    filled = lambda section: _filled(_with_searches(section, found), found)  # noqa: E731
    return [replace(page, sections=list(map(filled, page.sections))) for page in pages]


def by_settings(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the finished runs, and those whose loss diverged, by their `settings_key`."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        identity = (record.environment() or {}).get("identity")
        if identity and (record.status == "finished" or (record.status == "failed" and has_diverged(record.reason))):
            found[settings_key(identity["differs"], identity["labels"]["data"])].append(record)
    return found


def has_diverged(reason: str) -> bool:
    """Return whether a run failed for this reason: a loss that is no number."""
    return any(f"loss is {word}" in reason for word in ("nan", "inf", "-inf"))


def runs_of(job: Job, found: Mapping[str, Sequence[Record]], text: str = "") -> dict[int, Record]:
    """Return the runs of a job by seed, the first by name of each, whose data's fingerprint begins with `text`."""
    runs: dict[int, Record] = {}
    for run in found.get(job.key, ()):
        environment = run.environment()
        if str(environment["data"]["fingerprint"]).startswith(text):
            runs.setdefault(int(environment["identity"]["labels"]["seed"]), run)
    return {seed: runs[seed] for seed in job.seeds if seed in runs}


def _with_searches(section: Section, found: Mapping[str, Sequence[Record]]) -> Section:
    """Return the section with its arms at the best rates of their searches."""
    if section.search is None:
        return section
    how, text = section.search, section.text or ""
    searches = [search(job, how, lambda job: runs_of(job, found, text)) for job in section.jobs]
    return replace(section, searches=searches, jobs=[each.best for each in searches])


def _filled(section: Section, found: Mapping[str, Sequence[Record]]) -> Section:
    """Return the section with one run for each seed: the first, by name, of the section's text."""
    wanted = []  # job, seed, data set, fingerprint, run
    texts: dict[str, Counter[str]] = defaultdict(Counter)  # data set -> fingerprints of the runs
    for job in section.jobs:
        for run in found.get(job.key, ()):
            environment = run.environment()
            labels, text = environment["identity"]["labels"], str(environment["data"]["fingerprint"])
            if (seed := int(labels["seed"])) in job.seeds:
                wanted.append((job.name, seed, labels["data"], text, run))
                texts[labels["data"]][text] += 1
    usual = {data: counted.most_common(1)[0][0] for data, counted in texts.items()}
    taken: dict[str, dict[int, Record]] = defaultdict(dict)  # job -> seed -> run
    others = []
    for name, seed, data, text, run in wanted:
        if text.startswith(section.text or usual[data]) and seed not in taken[name]:
            taken[name][seed] = run
        else:
            others.append(run)
    jobs = []
    for job in section.jobs:
        runs = dict(sorted(taken[job.name].items()))
        finished = {seed: run for seed, run in runs.items() if run.status == "finished"}
        jobs.append(replace(job, runs=finished, diverged=tuple(seed for seed in runs if seed not in finished)))
    return replace(section, jobs=jobs, others=others)
