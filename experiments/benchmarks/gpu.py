"""All that is to be known of a machine with one GPU: tests, speed, memory and short real runs, in eight minutes.

    make gpu [OUT=gpu-results] [PYTHON=python3] [ARGS='--stages tests arms']

Needs torch and what train.py needs, and no network; ADAFRUGAL_MIRRORS may name a directory with copies of c4 and
t5-base. Each stage is a process with a time limit of its own, and what fails stops no other. OUT gets results.json (the
machine, the code, how each stage ended), log.txt (what the stages printed) and a JSON file of each stage's figures;
`make tables` makes a page of such directories below experiments/results/gpu. With --device cpu all is done with tiny
models, to see that it works.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms

from adafrugal.reports import gpu as reports
from adafrugal.settings.compose import REPOSITORY
from adafrugal.system import allocator
from adafrugal.tracking import environment

HERE = Path(__file__).resolve().parent
STEPS = (
    "frugal blocks 0.25", "frugal blocks 0.25, int8", "frugal slab 0.25", "frugal columns 0.25",
    "frugal columns 0.25, int8", "frugal rows 0.25", "frugal 0 (signsgd)", "frugal svd 0.25, iterated",
    "frugal blocks 0.25, whiten", "frugal blocks 0.25, sinkhorn",
)  # fmt: skip
CARD = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    found |= {"card": card.name, "multiprocessors": card.multi_processor_count, "memory": card.total_memory}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Stage:
    """A part of the whole.

    Args:
        name: of it, and of its JSON file.
        command: the process, without the JSON file.
        limit: seconds after which it is stopped.
        writes: whether it takes --json.
        beside: whether it runs beside the stage before it: neither measures time.
    """

    name: str
    command: Sequence[str]
    limit: float
    writes: bool = True
    beside: bool = False


def stages(device: str, cache: Path) -> list[Stage]:
    """What is done, in this order; on a CPU in a short form."""
    python, on = sys.executable, ("--device", device)

    def script(name: str, *arguments: str) -> list[str]:
        return [python, str(HERE / f"{name}.py"), *on, *arguments]

    kept = ("--cache", str(cache), "--set", *text(device, cache))
    single = ["env", "OMP_NUM_THREADS=1"]  # for what are many processes
    tests = [*single, python, "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider"]
    if device == "cpu":
        loop = script("harness", "--model", "llama_tiny", "--batch", "4", "--length", "32", "--rounds", "1",
                      "--steps", "2", *kept)  # fmt: skip
        return [
            Stage("tests", [*tests, "tests/training/test_clock.py"], 200, writes=False),
            Stage("arms", script("arms", "--arms", "adamw", "adafrugal", "--steps", "2", *kept), 200),
            Stage("memory", script("device_memory", "--steps", "2", "--processes", "1"), 200, beside=True),
            Stage("steps", script("optimizer_step", "--sizes", "tiny", "--only", *STEPS[:2], "--seconds", "0.1",
                                  "--passes", "tiny"), 200),
            Stage("loop", [*loop, "--optimizers", "adamw", "frugal"], 200, beside=True),
            Stage("loop_small", loop, 200),
            Stage("llama_7b", script("device_memory", "--cuts", "--steps", "2"), 200, beside=True),
        ]
    workers = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"] if _has("xdist") else []
    loop = script("harness", "--model", "llama_60m", "--length", "256", "--precision", "bf16", "--rounds", "6",
                  "--steps", "20", *kept)  # fmt: skip
    return [
        Stage("tests", [*tests, *workers], 150, writes=False),
        Stage("arms", [*single, *script("arms", *kept)], 130),
        Stage("memory", script("device_memory", "--processes", "6"), 130, beside=True),
        Stage("steps", script("optimizer_step", "--only", *STEPS, "--seconds", "0.6", "--passes", "350m"), 120),
        Stage("loop", [*loop, "--batch", "128", "--optimizers", "adamw", "frugal"], 120),
        Stage("loop_small", [*loop, "--batch", "16"], 75),
        Stage("llama_7b", ["env", f"{allocator.VARIABLES[0]}={allocator.GROW}",  # as train.py sets it
                           *script("device_memory", "--cuts", "--steps", "4")], 80),
    ]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def text(device: str, cache: Path) -> list[str]:
    """The settings of the text that is trained on; on a CPU a small one, which is prepared in a moment."""
    if device == "cpu":
        file = cache / "docs.txt"
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(page.read_text() for page in sorted((REPOSITORY / "docs").glob("*.md"))))
        return ["data=text", f"data.source={file}", "data.repeat=true"]
    return arms.text()


@dataclass
class Running:
    """A stage under way.

    Args:
        stage: what it is.
        out: where its results go.
    """

    stage: Stage
    out: Path

    def __post_init__(self) -> None:
        self.begun, stage = time.perf_counter(), self.stage
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  `end` closes it
        command = [*stage.command, *(["--json", str(self.out / f"{stage.name}.json")] if stage.writes else [])]
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, cwd=REPOSITORY, start_new_session=True
        )

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.begun

    def is_over(self) -> bool:
        """Whether it has ended, or should."""
        return self.process.poll() is not None or self.seconds > self.stage.limit

    def end(self) -> dict[str, Any]:
        """End it with everything that it started; how it ended, and the last line that it printed."""
        code, seconds = self.process.poll(), round(self.seconds, 1)
        outcome = "timed out" if code is None else "failed" if code else "passed"
        self.kill()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").replace(f"{REPOSITORY}/", "")
        self.log.close()
        with (self.out / "log.txt").open("a") as file:
            file.write(f"=== {self.stage.name}: {outcome} after {seconds} s\n{said}\n")
        found = {"stage": self.stage.name, "outcome": outcome, "seconds": seconds, "limit": self.stage.limit}
        found |= {"exit": code, "last": (said.strip().splitlines() or [""])[-1]}
        return found | (tests(said) if self.stage.name == "tests" else {})

    def kill(self) -> None:
        """End all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def tests(said: str) -> dict[str, Any]:
    """How many of pytest's tests passed, failed and were skipped, as far as it came, and which failed."""
    ends = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR|SKIPPED) +(tests/[^\[\s]+(?:\[.*\])?)|"
                      r"^(tests/\S+.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", said, re.MULTILINE)  # fmt: skip
    pairs = {(name or other, end or other_end) for end, name, other, other_end in ends}
    counts = Counter(end.lower() for _, end in pairs)
    failed = sorted(name for name, end in pairs if end in ("FAILED", "ERROR"))
    return {"tests": {key: counts[key] for key in ("passed", "failed", "error", "skipped")}, "failed": failed}


def machine(device: str, commit: str | None) -> dict[str, Any]:
    """What the figures are of: card, driver, versions, code and date."""
    found = environment.describe()
    code, packages = found["code"], found["packages"]
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or code["commit"] or "unknown", "changed": code["changed"], "device": device,
        "python": found["python"], "torch": packages.get("torch"), "transformers": packages.get("transformers"),
        "platform": found["platform"], "processor": found["processor"], "cores": found["cores"],
    }  # fmt: skip
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    about |= _asked(driver, lambda text: {"driver": text.split()[0]})
    return about | _asked([sys.executable, "-c", CARD], json.loads)


def _asked(command: Sequence[str], read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What a command answers; nothing where it cannot."""
    try:
        return read(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def carry_out(wanted: Sequence[Stage], out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the stages, those that may beside each other; results.json is whole after each group of them."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "results.json", *(f"{stage.name}.json" for stage in wanted)):
        (out / name).unlink(missing_ok=True)  # of an earlier run
    ended: list[dict[str, Any]] = []
    left = list(wanted)
    while left:
        group = [left.pop(0)]
        while left and left[0].beside:
            group.append(left.pop(0))
        print(", ".join(f"{stage.name} (at most {stage.limit:.0f} s)" for stage in group), flush=True)
        found = together(group, out)
        ended += [found[stage.name] for stage in group]
        (out / "results.json").write_text(json.dumps(about | {"stages": ended}, indent=1) + "\n")
    return ended


def together(group: Sequence[Stage], out: Path) -> dict[str, dict[str, Any]]:
    """Run stages beside each other; how each ended, by name."""
    running, found = [Running(stage, out) for stage in group], {}
    try:
        while running:
            for one in [one for one in running if one.is_over()]:
                found[one.stage.name] = one.end()
                running.remove(one)
            time.sleep(0.05)
    finally:
        for one in running:  # somebody has interrupted this
            one.kill()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages and print a table of them; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "gpu-results", help="the directory of the results")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--stages", nargs="+", help="default: all")
    parser.add_argument("--commit", help="what the code is called where there is no checkout")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "cache", help="where prepared text is kept")
    given = parser.parse_args(arguments)
    out, everything = given.out.resolve(), stages(given.device, given.cache.resolve())
    wanted = [stage for stage in everything if given.stages is None or stage.name in given.stages]
    if unknown := set(given.stages or ()) - {stage.name for stage in everything}:
        parser.error(f"there is no stage {', '.join(unknown)}; there are {', '.join(s.name for s in everything)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that stages end with it
    ended = carry_out(wanted, out, machine(given.device, given.commit))
    print(f"\n{reports.outcomes(reports.read(out))}\n\nresults in {out}")
    return int(any(stage["outcome"] != "passed" for stage in ended))


if __name__ == "__main__":
    sys.exit(main())
