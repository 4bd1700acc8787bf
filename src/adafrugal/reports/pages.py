"""The pages of tables: Markdown to read, LaTeX and CSV beside it, pictures, claims, and an index over all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from adafrugal.reports import claims, gpu, layouts, pictures
from adafrugal.reports.arms import Job
from adafrugal.reports.figures import Measured
from adafrugal.reports.plan import Page, Section
from adafrugal.reports.records import Packed
from adafrugal.settings.explain import nearest
from adafrugal.system.errors import SettingError
from adafrugal.tracking.record import Record

MADE = "<!-- made by `make tables`; what is written here by hand is lost -->"


def write(pages: Sequence[Page], out: Path, measured: Sequence[Measured] = ()) -> list[Path]:
    """Write every page and the index into a directory; what is there already is replaced.

    Args:
        pages: of tables.
        out: the directory.
        measured: on GPUs; without any there is no page of them.

    Returns:
        The files.

    Raises:
        SettingError: a page names what there is not, and nothing is written; or the directory cannot be written to.
    """
    for page in pages:
        for section in page.sections:
            _refuse_unknown(page, section)
    try:
        return _write_pages(pages, out, measured)
    except OSError as error:
        raise SettingError(f"{error.filename}: {error.strerror}; choose a directory that can be written to") from error


def _refuse_unknown(page: Page, section: Section) -> None:
    """Names in a page's file that nothing here is called by."""
    allowed = {
        "kind": layouts.KINDS,
        "pictures": pictures.TITLES,
        "claims": claims.CLAIMS,
        "published": layouts.columns(),
    }
    for key, names in allowed.items():
        given = getattr(section, key)
        for name in (given,) if isinstance(given, str) else given:
            if name not in names:
                where = f"experiments/tables/{page.name}.yaml, section {section.name}: {key}"
                raise SettingError(f"{where} has no {name!r}; {nearest(name, names)}")


def _write_pages(pages: Sequence[Page], out: Path, measured: Sequence[Measured]) -> list[Path]:
    files = [file for page in pages for file in _write_page(page, out / page.name)]
    index = out / "README.md"
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_text(_index(pages) + ("\n[Measured on GPUs](gpu/README.md)\n" if measured else ""))
    if measured:
        files.append(out / "gpu" / "README.md")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(f"{MADE}\n\n{gpu.markdown(measured)}")
    return [*files, index]


def _write_page(page: Page, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "README.md"]
    parts = [MADE, f"# {page.file.title}", _commands(page.file.commands), page.file.about.strip()]
    for section in page.sections:
        text, more = _section(section, out)
        parts.append(text)
        files += more
    files[0].write_text("\n\n".join(parts) + "\n")
    return files


def _section(section: Section, out: Path) -> tuple[str, list[Path]]:
    grids, files = layouts.grids(section), []
    parts = [f"## {section.title}", _commands(section.commands)]
    if section.note:
        parts.append(section.note.strip())
    for number, (title, grid) in enumerate(grids.items()):
        stem = section.name if number == 0 else f"{section.name}-{number + 1}"
        caption = ": ".join(part for part in (section.title, title.rstrip(":")) if part)
        for suffix, text in (("tex", grid.latex(caption)), ("csv", grid.csv())):
            file = out / f"{stem}.{suffix}"
            file.write_text(text)
            files.append(file)
        parts += [*([title] if title else []), grid.markdown()]
    parts += [text for text in (layouts.sources(section), _missing(section), _others(section, out)) if text]
    if section.claims and any(job.runs for job in section.jobs):
        parts.append(f"### What the papers claim\n\n{claims.markdown(section)}")
    for file in pictures.draw(section, out):
        title = pictures.TITLES[file.stem.removeprefix(f"{section.name}-")]
        parts.append(f"![{title}: {section.title}]({file.name})")
        files.append(file)
    if any(job.runs for job in section.jobs):
        parts.append(_runs(section, out))
    return "\n\n".join(parts), files


def _commands(commands: Sequence[str]) -> str:
    return "\n".join(f"    python train.py {command}" for command in commands)


def _missing(section: Section) -> str:
    """Which runs there are not, with the commands that make them."""
    jobs = [job for job in section.jobs if job.missing]
    count, wanted = sum(len(job.missing) for job in jobs), sum(len(job.seeds) for job in section.jobs)
    if not jobs:
        return ""
    if all(not job.runs for job in section.jobs):
        return f"None of the {wanted} runs is recorded; the command above makes them."
    lines = [f"    python train.py{_seeds(job)} {job.command}" for job in jobs]
    return f"{count} of {wanted} runs are missing; this makes them:\n\n" + "\n".join(lines)


def _seeds(job: Job) -> str:
    seeds = ",".join(str(seed) for seed in job.missing)
    return f" -m seed={seeds}" if len(job.missing) > 1 else "" if seeds == "0" else f" seed={seeds}"


def _runs(section: Section, out: Path) -> str:
    lines = ["<details><summary>The runs of this table</summary>", ""]
    for job in section.jobs:
        links = (f"[seed {seed}]({_link(run, out)})" for seed, run in job.runs.items())
        if job.runs:
            lines.append(f"- {job.name}: {', '.join(links)}")
    return "\n".join([*lines, "", "</details>"])


def _others(section: Section, out: Path) -> str:
    """What has the same settings and is left out."""
    links = ", ".join(f"[{run.directory.name}]({_link(run, out)})" for run in section.others)
    return f"Left out, since they read another text or are there twice: {links}." if links else ""


def _link(run: Record, out: Path) -> str:
    """The path to a run's directory; of a packed run, to its archive, with the name inside behind a #."""
    file, inside = (run.archive, f"#{run.name}") if isinstance(run, Packed) else (run.directory, "")
    return Path(os.path.relpath(file.resolve(), out.resolve())).as_posix() + inside


def _index(pages: Sequence[Page]) -> str:
    lines = [MADE, "# Results", "", "| page | table | runs | claims |", "| --- | --- | ---: | --- |"]
    for page in pages:
        for section in page.sections:
            runs = sum(len(job.runs) for job in section.jobs)
            wanted = sum(len(job.seeds) for job in section.jobs)
            judged = [f"{name} {claims.verdict(claims.judge(claims.CLAIMS[name], section))}" for name in section.claims]
            said = "; ".join(judged) if runs else ""
            row = [f"[{page.file.title}]({page.name}/README.md)", section.title, f"{runs} of {wanted}", said]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"
