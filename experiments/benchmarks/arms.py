"""Does every arm of a table run? The real train.py with an experiment's settings, cut short; the first arm alone.

    python experiments/benchmarks/arms.py [--device cuda] [--table c4_60m] [--arms adamw frugal] [--json FILE]

The text is C4 where ADAFRUGAL_MIRRORS names a directory with c4 and t5-base, else the embedded one. What is changed of
an experiment is how long it is and how many rows it takes at a time, so that all fit a GPU beside each other; their
tokens/s are of runs that share it. The first arm prepares the text and compiles the model for all. On a CPU the model
is the tiny one of scale=smoke.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import bench

from adafrugal.settings.compose import REPOSITORY
from adafrugal.tracking.record import Record

SHORT = ("schedule.warmup=null", "schedule.cycle={steps}", "trainer.steps={steps}", "trainer.log_every=5",
         "eval.every={steps}", "checkpoint.every={steps}", "tracking=local")  # fmt: skip
ON_A_GPU = ("trainer.batch_size=32", "trainer.micro_batch_size=32", "eval.tokens=65536")  # one, so that graphs are made
ON_A_CPU = ("scale=smoke", "trainer.batch_size=4", "trainer.micro_batch_size=4", "eval.tokens=1024")


def text() -> list[str]:
    """The settings of the text that is there without a network."""
    mirrors = os.environ.get("ADAFRUGAL_MIRRORS")
    if not mirrors:
        return ["data=embedded"]
    place = Path(mirrors).resolve()
    return ["data=c4", f"data.source={place / 'c4'}", f"data.tokenizer.name={place / 't5-base'}", "data.repeat=true"]


def arms(table: str) -> list[str]:
    """The arms of a table: the files of its directory."""
    files = (REPOSITORY / "experiments" / table).glob("*.yaml")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def words(arm: str, given: argparse.Namespace) -> list[str]:
    """The settings of an arm, cut short."""
    short = [word.format(steps=given.steps) for word in SHORT]
    cut = ON_A_GPU if given.device == "cuda" else ON_A_CPU
    where = [f"trainer.device={given.device}", f"cache_root={given.cache}"]
    return [f"experiments={given.table}/{arm}", *(given.set or text()), *short, *cut, *where]


def run(arm: str, given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One arm to its end: what train.py answered, and what its record says."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *words(arm, given), f"run_root={root / arm}"]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.limit)
        code, said = done.returncode, done.stderr
    except subprocess.TimeoutExpired as late:
        code, said = None, f"{(late.stderr or b'').decode()}\nstopped after {given.limit:.0f} s"
    found: dict[str, Any] = {"arm": arm, "exit": code, "seconds": time.perf_counter() - begun}
    found["last"] = (said.strip().splitlines() or [""])[-1]
    return found | recorded(root / arm)


def recorded(root: Path) -> dict[str, Any]:
    """Loss, speed, state and memory of the run below a directory, as far as it came."""
    lines = next((Record(file.parent).metrics() for file in root.rglob("metrics.jsonl")), [])
    if not lines:
        return {}
    last = lines[-1]
    return {
        "steps": last["step"], "loss": last["loss"], "validation_loss": last.get("validation_loss"),
        "tokens_per_s": last["tokens_per_second"], "state_bytes": last["state_bytes"],
        "peak": last["memory"].get("peak"), "checkpoint": any(root.rglob("state.pt")),
    }  # fmt: skip


def line(one: dict[str, Any]) -> str:
    """An arm in a line."""
    if one["exit"] == 0:
        return f"{one['arm']:<20} loss {one['loss']:.3f}, {one['tokens_per_s']:,.0f} tokens/s"
    return f"{one['arm']:<20} exit code {one['exit']}: {one['last']}"


def main() -> int:
    """Run the arms; 1 where one failed."""
    parser = bench.parser(__doc__, device="cuda")
    parser.add_argument("--table", default="c4_60m", help="a directory of experiments")
    parser.add_argument("--arms", nargs="+", help="default: all of the table")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=8, help="at a time")
    parser.add_argument("--limit", type=float, default=90, help="seconds for each")
    parser.add_argument("--set", nargs="+", metavar="NAME=VALUE", help="of all arms: which text they read")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "cache")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    first, *others = given.arms or arms(given.table)
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(given.jobs) as pool:
        alone = run(first, given, Path(root))  # prepares the text and compiles the model for all
        for one in chain([alone], pool.map(lambda arm: run(arm, given, Path(root)), others)):
            found.append(one)
            print(line(one), flush=True)
            bench.keep({"table": given.table, "device": given.device, "jobs": given.jobs, "arms": found}, given.json)
    return int(any(one["exit"] != 0 for one in found))


if __name__ == "__main__":
    sys.exit(main())
