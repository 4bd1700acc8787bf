"""How long a checkpoint holds the training, and how long a run takes to go on.

    python experiments/benchmarks/checkpoint.py [--model llama_60m] [--out results.json]

Runs the real train.py with AdamW, which keeps the most state, and with AdaFRUGAL: 100 short steps, a checkpoint after
every twentieth; SIGTERM, and the same command again. `held` are the seconds for which the loop stood still for a
checkpoint (the first one takes fresh memory, the others use it again), `written` those of writing beside the training,
`resumed` those from the start of the second process to its first new step, `imports` what importing its packages takes.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench

from adafrugal.settings.compose import REPOSITORY
from adafrugal.tracking.record import Record

IMPORTS = "import transformers.models.llama, adafrugal.training.loop, adafrugal.training.tasks.pretrain"


def measure(model: str, optimizer: str, root: Path) -> dict[str, Any]:
    """One arm, stopped once."""
    command = [sys.executable, str(REPOSITORY / "train.py"), f"model={model}", f"optimizer={optimizer}",
               "tracking=local", "trainer.steps=100", "trainer.batch_size=1", "trainer.sequence_length=64",
               "trainer.log_every=1", "eval.every=100", "eval.tokens=64", "checkpoint.every=20",
               f"run_root={root}"]  # fmt: skip
    if optimizer == "adafrugal":
        command.append("optimizer.interval.every=100")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while _steps(root) < 50:
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    first.wait()
    before = _steps(root)
    begun = time.perf_counter()
    second = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while _steps(root) <= before:
        time.sleep(0.01)
    resumed = time.perf_counter() - begun
    if second.wait():
        raise SystemExit(second.returncode)
    (file,) = root.glob("*/*/status.json")
    written = [event for event in Record(file.parent).events() if event["event"] == "checkpoint"]
    newest = max((file.parent / "checkpoints").glob("step-*"))
    return {
        "megabytes": sum(part.stat().st_size for part in newest.iterdir()) / 1e6,
        "held": [round(event["held"], 3) for event in written],
        "written": round(statistics.median(event["seconds"] for event in written), 3),
        "resumed": round(resumed, 2),
    }


def table(found: dict[str, Any]) -> str:
    """What was found, in Markdown."""
    heads = "optimizer | checkpoint, MB | held, the first, s | most of the others, s | written in, s | resumed in, s"
    rows = []
    for arm, one in found.items():
        if isinstance(one, dict):
            held = [f"{max(one['held']):.2f}", f"{statistics.median(one['held']):.2f}"]
            rows.append([arm, f"{one['megabytes']:.0f}", *held, f"{one['written']:.1f}", f"{one['resumed']:.1f}"])
    return bench.markdown(heads, rows)


def _steps(root: Path) -> int:
    files = list(root.glob("*/*/metrics.jsonl"))
    return files[0].read_text().count("\n") if files else 0


def imports() -> float:
    """Seconds, with the files in the system's cache."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return round(time.perf_counter() - begun, 2)


def main() -> None:
    """Measure both arms, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    imports()
    found: dict[str, Any] = {"model": given.model, "imports": imports()}
    for optimizer in ("adamw", "adafrugal"):
        with tempfile.TemporaryDirectory() as root:
            found[optimizer] = measure(given.model, optimizer, Path(root))
    print(f"{table(found)}\n\nof the last, imports: {found['imports']} s")
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
