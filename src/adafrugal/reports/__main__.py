"""`python -m adafrugal.reports [directory …]`: the runs in these directories (default: runs), side by side.

With --pages it writes the pages of `experiments/tables` instead: every table of the papers with the runs that belong to
it, what is missing of it, its pictures and claims. Where there are results of `make gpu`, they have a page, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from adafrugal.reports import table
from adafrugal.system.errors import WRONG, SettingError
from adafrugal.system.stderr import tell
from adafrugal.tracking.record import Record

if TYPE_CHECKING:
    from adafrugal.reports.plan import Page


def main() -> int:
    """Print or write the tables; 2 where there is nothing to make them of."""
    parser = argparse.ArgumentParser(
        prog="python -m adafrugal.reports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="*", help="where to look for runs")
    parser.add_argument(
        "--wandb", metavar="ENTITY/PROJECT", help="a project at W&B, whose finished runs come to runs/wandb"
    )
    parser.add_argument("--pages", metavar="DIRECTORY", help="write the pages of all tables there")
    given = parser.parse_args()
    try:
        return _report(given)
    except SettingError as error:
        tell(f"error: {error}")
        return WRONG


def _report(given: argparse.Namespace) -> int:
    named = given.directories or ([] if given.wandb else ["runs"])
    places = [Path(name.removeprefix("run_root=")) for name in named]
    records = table.find(places)
    if given.wandb:
        from adafrugal.tracking import wandb

        records += wandb.fetch(given.wandb, Path("runs") / "wandb" / given.wandb)
    if given.pages and records:
        return _pages(records, places, Path(given.pages))
    if not records:
        looked = ", ".join([*map(str, places), *([f"W&B's {given.wandb}"] if given.wandb else [])])
        tell(f"error: there are no runs in {looked}; make one with `python train.py`, or name another")
        return WRONG
    sys.stdout.write(table.markdown(records))
    return 0


def _pages(records: list[Record], places: list[Path], out: Path) -> int:
    from adafrugal.reports import gpu, pages, plan

    sys.stderr.write("composing the settings of all tables: under a minute\n")
    made = plan.filled(plan.pages(), records)
    files = pages.write(made, out, gpu.find(places))
    sys.stdout.write(f"{len(made)} pages in {len(files)} files, with {_used(made)} of {len(records)} runs → {out}\n")
    return 0


def _used(made: list[Page]) -> int:
    return len({run.directory for p in made for s in p.sections for job in s.jobs for run in job.runs.values()})


if __name__ == "__main__":
    sys.exit(main())
