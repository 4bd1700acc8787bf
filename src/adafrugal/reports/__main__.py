"""`python -m adafrugal.reports [directory …]`: the runs in these directories (default: runs), side by side.

With --pages it writes the pages of `experiments/tables` instead: every table of the papers with the runs that belong to
it, its missing runs, pictures and claims. Results of `make gpu` have a page, too. --page FILE is one page that FILE
describes, wherever that lies, in the directory of --pages (default: tables), from the runs of its commands' run_root
unless directories are named.

--watch writes index.html into the first directory, a page of all runs below, again and again while they go on; --once
writes it once.

--pack DIRECTORY writes the records of all runs below it to DIRECTORY.tar.xz, the same file for the same records. Every
command here reads such a file like the directory. --unpack DIRECTORY.tar.xz [elsewhere] writes the records back, each
byte as it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adafrugal.reports import gpu, pages, plan, records, table
from adafrugal.settings.command_line import Parser
from adafrugal.system.errors import WRONG, SettingError
from adafrugal.system.stderr import tell


def main() -> int:
    """Print or write the tables; return 2 after a SettingError, such as no runs."""
    parser = Parser(
        prog="python -m adafrugal.reports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="*", help="where to look for runs")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="copy a W&B project's finished runs to runs/wandb")
    parser.add_argument("--pages", metavar="DIRECTORY", type=Path, help="write the pages of all tables there")
    parser.add_argument("--watch", action="store_true", help="write a page of the runs, index.html, until Ctrl-C")
    parser.add_argument("--once", action="store_true", help="write that page once")
    parser.add_argument("--page", metavar="FILE", type=Path, help="check this page's file, and write the page alone")
    parser.add_argument("--pack", metavar="DIRECTORY", type=Path, help="write the records below it to one file")
    parser.add_argument("--unpack", metavar="FILE", type=Path, help="write the records of such a file to a directory")
    try:
        given = parser.parse_args()
        if given.watch or given.once:
            from adafrugal.reports import live

            live.watch(_places(given.directories or ["runs"]), given.once)
            return 0
        sys.stdout.write(_report(given))
    except SettingError as error:
        tell(f"error: {error}")
        return WRONG
    return 0


def _report(given: argparse.Namespace) -> str:
    try:
        if given.pack:
            return f"{records.pack(given.pack)}\n"
        if given.unpack:
            to = Path(given.directories[0]) if given.directories else records.unpacked(given.unpack)
            return f"{records.unpack(given.unpack, to)} runs → {to}\n"
    except OSError as error:
        raise SettingError(f"{error.filename}: {error.strerror}; choose a directory that can be written to") from error
    page = plan.page(given.page) if given.page else None  # before the runs are read
    named = given.directories or ([] if given.wandb else plan.roots(page) if page else ["runs"])
    places = _places(named)
    for place in places if page and given.directories else ():  # else a page without runs would replace the page
        if not (place.exists() or Path(f"{place}{records.SUFFIX}").exists()):
            raise SettingError(f"{place} does not exist; name a directory or an archive of runs, or leave it out")
    found = records.find(places)
    if given.wandb:
        from adafrugal.tracking import wandb

        found += wandb.fetch(given.wandb, Path("runs") / "wandb" / given.wandb)
    looked = ", ".join([*map(str, places), *([f"W&B's {given.wandb}"] if given.wandb else [])])
    if page:
        return _one(plan.filled([page], found)[0], given.pages or Path("tables"), len(found), looked)
    if not found:
        raise SettingError(f"there are no runs in {looked}; make one with `python train.py`, or name another")
    if not given.pages:
        return table.markdown(found)
    tell("composing the settings of all tables: under a minute")
    made = plan.filled(plan.pages(), found)
    files = pages.write(made, given.pages, gpu.find(places))
    used = {run.directory for page in made for section in page.sections for run in section.runs}
    return f"{len(made)} pages in {len(files)} files, with {len(used)} of {len(found)} runs → {given.pages}\n"


def _places(named: Sequence[str]) -> list[Path]:
    return [Path(name.removeprefix("run_root=")) for name in named]


def _one(page: plan.Page, out: Path, count: int, looked: str) -> str:
    """Write one page; return what it has, and the commands that make what it misses."""
    pages.write_one(page, out)
    lines = []
    for section in page.sections:
        wanted = sum(len(job.seeds) for job in section.jobs)
        lines.append(f"{section.title}: {len(section.runs)} of {wanted} runs" if wanted else section.title)
        if said := pages.missing(section) if section.runs or section.waiting else pages.made_by(section):
            lines.append(said)
    return "\n".join([*lines, f"{count} runs read in {looked} → {out / page.name / 'README.md'}"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
