"""Write the pages of tables: Markdown with LaTeX and CSV beside it, pictures, claims, and an index of all pages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from adafrugal.reports import claims, gpu, layouts, origin, pictures
from adafrugal.reports.arms import as_typed
from adafrugal.reports.plan import Page, Section
from adafrugal.reports.records import Packed
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

MADE = "<!-- made by `make tables`; what is written here by hand is lost -->"
MADE_ALONE = MADE.replace("make tables", "python -m adafrugal.reports --page")


def write(pages: Sequence[Page], out: Path, measured: Sequence[gpu.Measured] = ()) -> list[Path]:
    """Write every page, the index and the page of GPU measurements to a directory; return the files.

    Raises:
        SettingError: the directory is not writable.
    """
    index = _index(pages) + ("\n[Measured on GPUs](gpu/README.md)\n" if measured else "")
    about = {out / "gpu" / "README.md": f"{MADE}\n\n{gpu.markdown(measured)}"} if measured else {}
    return _written(pages, out, about | {out / "README.md": index})


def write_one(page: Page, out: Path) -> list[Path]:
    """Write one page below a directory, and leave the others and their index there alone; return the files.

    Raises:
        SettingError: the directory is not writable.
    """
    return _written([page], out, {}, MADE_ALONE)


def _written(pages: Sequence[Page], out: Path, more: Mapping[Path, str], made: str = MADE) -> list[Path]:
    files: dict[Path, str | None] = {}
    try:
        for page in pages:
            files |= _page(page, out / page.name, made)
        files |= more
        for file, text in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                file.write_text(text)
    except OSError as error:
        raise SettingError(f"{error.filename}: {error.strerror}; choose a directory that can be written to") from error
    return list(files)


def _page(page: Page, out: Path, made: str) -> dict[Path, str | None]:
    """Draw the pictures of a page; return its files with their text, None for pictures."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [made, f"# {page.file.title}", _commands(page.file.commands), page.file.about.strip()]
    files: dict[Path, str | None] = {out / "README.md": None}
    for section in page.sections:
        heading = f"## {section.title}" if section.title != page.file.title else ""
        parts += [heading, made_by(section), section.note.strip()]
        grids = layouts.grids(section)
        for number, (title, grid) in enumerate(grids.items()):
            stem = section.name if number == 0 else f"{section.name}-{number + 1}"
            caption = ": ".join(part for part in (section.title, title.rstrip(":")) if part)
            files |= {out / f"{stem}.tex": grid.latex(caption, _label(page, stem)), out / f"{stem}.csv": grid.csv()}
            parts += [title, grid.markdown()]
        parts.append(" ".join(dict.fromkeys(note for grid in grids.values() for note in grid.notes())))
        parts += [origin.line(section), *layouts.rules(section), layouts.sources(section)]
        parts += [layouts.diverged(section), missing(section), _others(section, out)]
        if section.runs:
            parts.append(claims.markdown(section))
        for name, file in pictures.draw(section, out).items():
            parts.append(f"![{pictures.DRAWN[name][0]}: {section.title}]({file.name})")
            files[file] = None
        parts.append(_runs(section, out))
    files[out / "README.md"] = "\n\n".join(part for part in parts if part) + "\n"
    return files


def _label(page: Page, stem: str) -> str:
    """Return the name of a table for LaTeX's references, which are of one document: with that of its page."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{page.name}-{stem}")


def _commands(commands: Sequence[str]) -> str:
    return "\n".join(f"    python train.py {as_typed(command)}" for command in commands)


def made_by(section: Section) -> str:
    """Return the commands that make a section's runs, with their search or with the rates that another found."""
    if section.source:
        jobs = [job for job in section.jobs if job.name not in section.waiting]
        return "\n".join(f"    python train.py{_seeds(job.seeds)} {job.command}" for job in jobs)
    if section.search is None:
        return _commands(section.commands)
    options = f" --trials {section.search.trials} --seeds {','.join(map(str, section.search.seeds))}"
    return "\n".join(f"    python -m adafrugal.launching.search {command}{options}" for command in section.commands)


def missing(section: Section) -> str:
    """Return the number of missing runs, with the commands that make them."""
    if section.waiting:
        arms = ", ".join(section.waiting)
        return f"{section.rates['from']} has no rates yet for {arms}: make its runs first."
    jobs = [job for job in section.jobs if job.missing]
    count, wanted = sum(len(job.missing) for job in jobs), sum(len(job.seeds) for job in section.jobs)
    if not jobs:
        return ""
    if not section.runs:
        return f"None of the {wanted} runs is recorded; the command above makes them."
    if section.searches:
        going_on = ", ".join(each.arm.name for each in section.searches if each.pending)
        searches = f", and the searches of {going_on} go on" if going_on else ""
        return f"{count} of {wanted} runs are missing{searches}; the command above makes what is missing."
    lines = [f"    python train.py{_seeds(job.missing)} {job.command}" for job in jobs]
    return f"{count} of {wanted} runs are missing; this makes them:\n\n" + "\n".join(lines)


def _seeds(wanted: Sequence[int]) -> str:
    seeds = ",".join(map(str, wanted))
    return f" -m seed={seeds}" if len(wanted) > 1 else "" if seeds == "0" else f" seed={seeds}"


def _runs(section: Section, out: Path) -> str:
    lines = []
    for job in section.jobs:
        if links := ", ".join(f"[seed {seed}]({_link(run, out)})" for seed, run in job.runs.items()):
            lines.append(f"- {job.name}: {links}")
    for each in section.searches:
        trials = [run for job in each.trials for run in job.runs.values()]
        if links := ", ".join(f"[{number}]({_link(run, out)})" for number, run in enumerate(trials, 1)):
            lines.append(f"- the search of {each.arm.name}: {links}")
    head = "<details><summary>The runs of this table</summary>"
    return "\n".join([head, "", *lines, "", "</details>"]) if lines else ""


def _others(section: Section, out: Path) -> str:
    links = ", ".join(f"[{run.directory.name}]({_link(run, out)})" for run in section.others)
    return f"Left out, since they read another text or are there twice: {links}." if links else ""


def _link(run: Record, out: Path) -> str:
    """Return the path to a run's directory, or for a packed run: archive#name."""
    file, inside = (run.archive, f"#{run.name}") if isinstance(run, Packed) else (run.directory, "")
    return Path(os.path.relpath(file.resolve(), out.resolve())).as_posix() + inside


def _index(pages: Sequence[Page]) -> str:
    lines = [MADE, "# Results", "", "| page | table | runs | claims |", "| --- | --- | ---: | --- |"]
    for page in pages:
        for section in (section for section in page.sections if section.kind != "side_by_side"):
            wanted = sum(len(job.seeds) for job in section.jobs)
            judged = (f"{name} {claims.verdict(claims.judge(claims.CLAIMS[name], section))}" for name in section.claims)
            said = "; ".join(judged) if section.runs else ""
            page_link, runs = f"[{page.file.title}]({page.name}/README.md)", f"{len(section.runs)} of {wanted}"
            lines.append(f"| {page_link} | {section.title} | {runs} | {said} |")
    return "\n".join(lines) + "\n"
