"""How the scripts of this directory begin and end. Import it before torch: it sets how torch's threads wait."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adafrugal.system import threads

threads.wait_asleep()


def parser(description: str | None, device: str | None = None) -> argparse.ArgumentParser:
    """A parser with --json, and with --device where it has a default."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, help="where the results are written to")
    if device:
        found.add_argument("--device", default=device, choices=["cpu", "cuda"])
    return found


def keep(found: Any, file: Path | None) -> None:
    """Write the results so far, where a file is named."""
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")


def markdown(heads: str, rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table under "head | head | …"; its first columns, `names` of them, are text, and all others numbers."""
    sides = ["---"] * names + ["---:"] * (heads.count(" | ") + 1 - names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ([heads], sides, *rows))
