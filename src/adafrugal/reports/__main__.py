"""`python -m adafrugal.reports [directory …]`: the runs in these directories (default: runs), side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adafrugal.reports import table


def main() -> int:
    """Print the tables; 2 where there is nothing to print."""
    parser = argparse.ArgumentParser(prog="python -m adafrugal.reports", description=__doc__)
    parser.add_argument("directories", nargs="*", default=["runs"], help="where to look for runs")
    places = [Path(given.removeprefix("run_root=")) for given in parser.parse_args().directories]
    records = table.find(places)
    if not records:
        looked = ", ".join(str(place) for place in places)
        sys.stderr.write(f"error: there are no runs in {looked}; make one with `python train.py`, or name another\n")
        return 2
    sys.stdout.write(table.markdown(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
