"""Read the pages of tables from `experiments/tables`, and find the runs that belong to each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from adafrugal.reports import best, lengths, page_file, spreads
from adafrugal.reports.arms import ARMS, Job, jobs, settings_key
from adafrugal.reports.page_file import PageFile, SectionFile
from adafrugal.reports.searches import Search, search
from adafrugal.settings import REPOSITORY
from adafrugal.settings.explain import nearest
from adafrugal.settings.repositories import is_path
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

TABLES = REPOSITORY / "experiments" / "tables"


@dataclass
class Section(SectionFile):
    """A table with its rows."""

    jobs: Sequence[Job] = ()
    others: Sequence[Record] = ()  # runs of its settings left out: of another text, or duplicates
    searches: Sequence[Search] = ()  # of the arms, as far as their runs go
    source: Section | None = None  # whose best rates the jobs have
    waiting: Sequence[str] = ()  # jobs for which the source has no rates yet
    beside: Mapping[str, Section] = field(default_factory=dict)  # sections of the page, by name, whose columns it shows

    @property
    def runs(self) -> list[Record]:
        """The finished runs of all jobs."""
        return [run for job in self.jobs for run in job.runs.values()]

    @cached_property
    def groups(self) -> dict[str, list[Job]]:
        """The jobs of each row, by the row's own name."""
        return best.arms(self.jobs, self.best_of) if self.best_of else {job.name: [job] for job in self.jobs}

    @cached_property
    def rows(self) -> dict[str, Job]:
        """The job that each row shows, named as it is shown, by the row's own name."""
        return {name: best.row(jobs, self.shown(name)) for name, jobs in self.groups.items()}

    @cached_property
    def losses(self) -> dict[str, dict[int, float]]:
        """The validation losses of each row by seed, by the row's own name."""
        read = lambda job: {seed: run.summary()["validation_loss"] for seed, run in job.runs.items()}  # noqa: E731
        return {name: read(job) for name, job in self.rows.items()}

    @property
    def references(self) -> list[str]:
        """The rows to compare with, as far as the section has them."""
        return [name for name in self.reference if name in self.groups]

    def shown(self, name: str) -> str:
        """Return the name of a row as tables show it."""
        return self.arms.get(name) or name


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
    files = {path: page_file.read(path) for path in sorted(directory.glob("*.yaml"))}
    return sorted((_page(path, file) for path, file in files.items()), key=lambda page: page.file.place)


def page(path: Path) -> Page:
    """Return the page that a file describes, without runs.

    Raises:
        SettingError: as for `pages`.
    """
    return _page(path, page_file.read(path))


def roots(page: Page) -> list[str]:
    """Return the directories in which a page's commands, and those of the searches for its rates, make their runs."""
    sections = [*page.sections, *(section.source for section in page.sections if section.source)]
    return sorted({job.settings.run_root for section in sections for job in section.jobs})


def _page(path: Path, file: PageFile) -> Page:
    _refuse_doubles([section.name for section in file.sections], f"{path}: two sections")
    return Page(path.stem, file, [_section(section, path) for section in file.sections])


def _section(file: SectionFile, path: Path) -> Section:
    where = f"{path}, section {file.name}"
    try:
        section = Section(**vars(file), jobs=jobs(file.commands))
        kinds = {"lengths": lengths.arms, "spreads": spreads.arms}  # whose rows are of several jobs
        rows = list(kinds[section.kind](section.jobs) if section.kind in kinds else section.groups)
        section.source = _source(section.rates.get("from"), path)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error
    _refuse_doubles([job.name for job in section.jobs], f"{where}: two rows")
    if section.kind == "side_by_side":
        return section
    tuned = next((job.name for job in section.jobs if job.settings.task.kind == "finetune"), None)
    if tuned is not None and section.kind in ("comparison", "lengths", "spreads"):
        raise SettingError(f"{where}: kind is {section.kind}, and {tuned} is fine-tuning; allowed: scores")
    for name in section.best_of:
        swept = dict.fromkeys(name for job in section.jobs for name in job.swept)
        page_file.refuse_other(name, [name for name in swept if name not in ARMS], f"{where}: best_of")
    for name in section.arms:
        page_file.refuse_other(name, rows, f"{where}: arms")
    _refuse_other_rows(section, rows, where)
    return _chosen(section)


def _refuse_other_rows(section: Section, rows: Sequence[str], where: str) -> None:
    """Refuse references and decisions that are no rows, and arms for which another section has no rates."""
    rows = [name for name in rows if name in section.arms] if section.arms else rows
    for name in section.reference if section.kind in ("comparison", "lengths") else ():
        if name not in rows:
            none = "" if section.kind == "lengths" else ", or null for none"
            raise SettingError(f"{where}: reference is {name!r}; {nearest(name, rows)}{none}")
    if section.kind == "lengths" and not section.reference:
        raise SettingError(f"{where}: reference is missing; {nearest('', rows)}")
    for name in section.decisions:
        page_file.refuse_other(name, rows, f"{where}: decisions")
    known = best.of_section(section.source) if section.source else {}
    for job in section.jobs if section.source else ():
        if not {job.name, job.arm} & known.keys():
            page_file.refuse_other(job.arm, known, f"{where}: rates: {section.rates['from']}")


def _source(name: str | None, path: Path) -> Section | None:
    """Return the section, without runs, whose rates another takes: of the same page, or of one beside it or of ours."""
    if name is None:
        return None
    page, _, section = name.rpartition("/")
    of_page = path if page in ("", path.stem) else path.with_name(f"{page}.yaml")
    if not of_page.exists():
        of_page = TABLES / f"{page}.yaml"
        page_file.refuse_other(page, [file.stem for file in TABLES.glob("*.yaml")], "rates: from: a page")
    found = _searched(of_page)
    elsewhere = [] if page else (f"{of.stem}/{each}" for of in sorted(TABLES.glob("*.yaml")) for each in _searched(of))
    if section not in found:
        page_file.refuse_other(section, [*found, *elsewhere], f"rates: from: {of_page}")
    return _section(found[section], of_page)


def _searched(of_page: Path) -> dict[str, SectionFile]:
    """Return the sections of a page's file that find rates, by their names."""
    sections = page_file.read(of_page).sections
    return {each.name: each for each in sections if each.search or each.best_of or each.kind == "search"}


def _chosen(section: Section) -> Section:
    """Return the section with the jobs of the arms that it shows, in their order."""
    if not section.arms:
        return section
    return replace(section, jobs=[job for name in section.arms for job in section.groups[name]])


def _refuse_doubles(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        raise SettingError(f"{what} have the same name, among {', '.join(names)}")


def filled(pages: Sequence[Page], records: Iterable[Record]) -> list[Page]:
    """Return the pages with the runs that belong to them: finished ones, and those whose loss diverged."""
    found = by_settings(records)
    return [_filled_page(page, found) for page in pages]


def _filled_page(page: Page, found: Mapping[str, Sequence[Record]]) -> Page:
    sections = [_filled(_with_rates(_with_searches(section, found), found), found) for section in page.sections]
    beside = {section.name: section for section in sections if section.kind == "comparison"}
    sections = [replace(s, beside=beside) if s.kind == "side_by_side" else s for s in sections]
    return replace(page, sections=sections)


def by_settings(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the finished runs, and those whose loss diverged, by their `settings_key`."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        identity = (record.environment() or {}).get("identity")
        if identity and (record.status == "finished" or (record.status == "failed" and has_diverged(record.reason))):
            found[settings_key(identity["differs"], identity["labels"]["data"])].append(record)
    return found


def has_diverged(reason: str) -> bool:
    """Return whether a run failed because a loss, or with `optimizer.nonfinite=error` a gradient, was no number."""
    return "is not finite at step" in reason or any(f"loss is {word}" in reason for word in ("nan", "inf", "-inf"))


def runs_of(job: Job, found: Mapping[str, Sequence[Record]], text: str = "") -> dict[int, Record]:
    """Return the runs of a job by seed, the first by name of each.

    Args:
        job: the job.
        found: runs, from `by_settings`.
        text: the start of their data's fingerprint; empty: they read the source that the job names.
    """
    runs: dict[int, Record] = {}
    for run in _reading([job], found, text)[job.name]:
        runs.setdefault(int(run.environment()["identity"]["labels"]["seed"]), run)
    return {seed: runs[seed] for seed in job.seeds if seed in runs}


def _reading(jobs: Sequence[Job], found: Mapping[str, Sequence[Record]], text: str) -> dict[str, list[Record]]:
    """Return the runs of each job, by its name, whose data's fingerprint begins with `text`.

    Without a text they are those that read the very source that the job names. If no run of a job with this source
    does, they are those of a path with the same last part, since a local copy may lie elsewhere; another repository of
    the hub is no copy.
    """
    if text:
        fits = lambda job, run: str(run.environment()["data"]["fingerprint"]).startswith(text)  # noqa: E731
        return {job.name: [run for run in found.get(job.key, ()) if fits(job, run)] for job in jobs}
    pairs = [(job, run) for job in jobs for run in found.get(job.key, ())]
    named = {_to_read(job) for job, run in pairs if _was_read(run) == _to_read(job)}
    runs: dict[str, list[Record]] = {job.name: [] for job in jobs}
    for job, run in pairs:
        has, wants = str(_was_read(run)), str(_to_read(job))
        is_copy = _last_part(has) == _last_part(wants) and not (_is_of_the_hub(run) and not is_path(wants))
        if has == wants or (_to_read(job) not in named and is_copy):
            runs[job.name].append(run)
    return runs


def _last_part(source: str) -> tuple[str, ...]:
    """Return the end of a path from its last name without * or ? on: of corpus/*.txt both parts."""
    parts = Path(source).parts
    plain = [place for place, part in enumerate(parts) if not set("*?") & set(part)]
    return parts[plain[-1] if plain else 0 :]


def _to_read(job: Job) -> str | None:
    return getattr(job.settings.data, "source", None)


def _was_read(run: Record) -> str | None:
    found: str | None = run.environment()["identity"]["differs"].get("data.source")
    return found


def _is_of_the_hub(run: Record) -> bool:
    """Return whether a run read a repository of the hub, whose revision its record has."""
    return run.environment()["data"].get("source", {}).get("revision") is not None


def _with_searches(section: Section, found: Mapping[str, Sequence[Record]]) -> Section:
    """Return the section with its arms at the best rates of their searches."""
    if section.search is None:
        return section
    how, text = section.search, section.text or _usual_text(section.jobs, found)
    searches = [search(job, how, lambda job: runs_of(job, found, text)) for job in section.jobs]
    return replace(section, searches=searches, jobs=[each.best for each in searches])


def _usual_text(jobs: Sequence[Job], found: Mapping[str, Sequence[Record]]) -> str:
    """Return the fingerprint of most runs that read what the jobs read; empty without any."""
    reads = {(job.data, _to_read(job)) for job in jobs}
    environments = ((run.environment(), _was_read(run)) for runs in found.values() for run in runs)
    texts = Counter(
        str(each["data"]["fingerprint"])
        for each, source in environments
        if (each["identity"]["labels"]["data"], source) in reads
    )
    return texts.most_common(1)[0][0] if texts else ""


def _with_rates(section: Section, found: Mapping[str, Sequence[Record]]) -> Section:
    """Return the section with its jobs at the best rates of another section, filled with its runs."""
    if section.source is None:
        return section
    source = _filled(_with_searches(section.source, found), found)
    jobs, waiting = best.at_rates(section.jobs, best.of_section(source))
    return replace(section, jobs=jobs, source=source, waiting=waiting)


def _filled(section: Section, found: Mapping[str, Sequence[Record]]) -> Section:
    """Return the section with one run for each seed: the first, by name, of the section's text."""
    jobs = [job for job in section.jobs if job.name not in section.waiting]
    reading = _reading(jobs, found, section.text or "")
    wanted = []  # job, seed, data set, fingerprint, run
    texts: dict[str, Counter[str]] = defaultdict(Counter)  # data set -> fingerprints of the runs
    others = []
    for job in jobs:
        for run in found.get(job.key, ()):
            environment = run.environment()
            labels, text = environment["identity"]["labels"], str(environment["data"]["fingerprint"])
            if (seed := int(labels["seed"])) not in job.seeds:
                continue
            if run in reading[job.name]:
                wanted.append((job.name, seed, labels["data"], text, run))
                texts[labels["data"]][text] += 1
            else:
                others.append(run)
    usual = {data: counted.most_common(1)[0][0] for data, counted in texts.items()}
    taken: dict[str, dict[int, Record]] = defaultdict(dict)  # job -> seed -> run
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
