"""What runs take, foretold; and how near that is to what the allocator hands out.

    python experiments/benchmarks/memory.py [--out results.json]

The estimates are those of `python -m adafrugal.memory`. What they are held against is two steps of the same model and
optimizer, made for real on a CPU in a process of its own: the bytes of all tensors, by the allocator's own events as
torch's profiler gives them, and beside it how much the process's largest resident size grew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = ("60m", "130m", "350m", "1b", "7b")
OPTIMIZERS = ("adamw", "galore", "badam", "frugal", "adafrugal")
SHAPE = ("trainer.precision=bf16", "trainer.batch_size=16", "trainer.sequence_length=256")
MEASURED = [
    (f"model=llama_{size}", *words)
    for size in ("9m", "20m", "35m", "60m")
    for words in (
        ("optimizer=adafrugal", "trainer.batch_size=4"),
        ("optimizer=adamw", "trainer.batch_size=8", "trainer.micro_batch_size=2", "trainer.precision=bf16"),
        ("optimizer=galore", "trainer.batch_size=8", "model.loss_chunk_rows=null"),
    )
]


def foretold(model: str, optimizer: str) -> dict[str, Any]:
    """One column, or two where ρ falls."""
    from adafrugal import composition
    from adafrugal.memory.estimate import estimate

    found = estimate(composition.settings([f"model=llama_{model}", f"optimizer={optimizer}", *SHAPE]))
    stages = [{"density": s.density, "state": s.state_bytes, "peak": s.peak.total} for s in found.stages]
    return {"model": model, "optimizer": optimizer, "weights": found.peak.weights, "stages": stages}


def held_against(words: list[str]) -> dict[str, Any]:
    """An estimate, and what two real steps allocate; in a process that does nothing else."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from adafrugal import composition, optimizers
    from adafrugal.config import settled
    from adafrugal.memory import measure
    from adafrugal.memory.estimate import estimate
    from adafrugal.models import llama
    from adafrugal.models.loss import token_nats

    settings = composition.settings(words)
    settings = settled(settings, None, settings.model.hidden_size)
    trainer = settings.trainer
    rows = trainer.micro_batch_size or trainer.batch_size
    expected = estimate(settings).peak
    before = measure.read(torch.device("cpu"))["resident"]
    tokens = torch.zeros(rows, trainer.sequence_length, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = llama.build(settings.model)
        optimizer = optimizers.build(settings, optimizers.groups(settings, model))
        for _ in range(2):
            for _ in range(min(2, trainer.batch_size // rows)):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=trainer.precision == "bf16"):
                    loss = token_nats(model, tokens, tokens, settings.model.loss_chunk_rows)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        resident = measure.read(torch.device("cpu"))["peak_resident"] - before
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return {
        "words": words,
        "estimate": expected.total,
        "phase": expected.phase,
        "allocated": most,
        "resident": resident,
    }


def estimates_table(rows: list[dict[str, Any]]) -> str:
    """GiB of optimizer state, and in parentheses of the peak, in Markdown."""
    heads = ["GiB", *(f"{m.upper()}" for m in MODELS)]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * len(MODELS)}"]
    weights = {row["model"]: row["weights"] for row in rows}
    lines.append(f"| weights | {' | '.join(_gib(weights[m]) for m in MODELS)} |")
    for optimizer in OPTIMIZERS:
        found = {row["model"]: row["stages"] for row in rows if row["optimizer"] == optimizer}
        for place in range(len(found[MODELS[0]])):
            density = found[MODELS[0]][place]["density"]
            name = optimizer if density is None else f"{optimizer}, ρ {density:.3g}"
            cells = (f"{_gib(found[m][place]['state'])} ({_gib(found[m][place]['peak'])})" for m in MODELS)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured_table(rows: list[dict[str, Any]]) -> str:
    """MiB foretold and handed out, in Markdown."""
    lines = [
        "| settings | estimate, MiB | allocated, MiB | error | resident, MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        error = f"{100 * (row['estimate'] / row['allocated'] - 1):+.1f}%"
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("estimate", "allocated", "resident")]
        lines.append(f"| `{' '.join(row['words'])}` | {sizes[0]} | {sizes[1]} | {error} | {sizes[2]} |")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def main() -> None:
    """Estimate, measure, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(held_against(given.measure)))
        return
    found = {"estimates": [foretold(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS], "measured": []}
    for words in MEASURED:
        command = [sys.executable, __file__, "--measure", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found["measured"].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{estimates_table(found['estimates'])}\n\n{measured_table(found['measured'])}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
