"""What runs take, foretold; and how near that is to what the allocator hands out.

    python experiments/benchmarks/memory.py [--out results.json]

The estimates are those of `python -m adafrugal.memory`. What they are held against is two steps of the same model and
optimizer, made for real on a CPU in a process of its own: the bytes of all tensors, by the allocator's own events as
torch's profiler gives them, and beside it how much the process's largest resident size grew. Likewise for each setting
that lowers memory, with the time of a step beside that of the same process without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench
import memory_of_runs
import torch
from torch.profiler import ProfilerActivity, profile

from adafrugal.memory import fit, measure
from adafrugal.memory.estimate import estimate
from adafrugal.memory.on_device import with_chunks
from adafrugal.models import llama, optimizers
from adafrugal.models.loss import TokenNats
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.optim import UpdateInBackward
from adafrugal.settings import compose
from adafrugal.settings.canonical import settled
from adafrugal.settings.schema import Settings

MODELS = ("60m", "130m", "350m", "1b", "7b")
OPTIMIZERS = ("adamw", "galore", "badam", "frugal", "adafrugal")
CHUNKS = "model.loss_chunk_rows=2048"  # where nothing else is said
SHAPE = (CHUNKS, "trainer.precision=bf16", "trainer.batch_size=16", "trainer.sequence_length=256")
MEASURED = [
    (f"model=llama_{size}", *words)
    for size in ("9m", "20m", "35m", "60m")
    for words in (
        ("optimizer=adafrugal", "trainer.batch_size=4"),
        ("optimizer=adamw", "trainer.batch_size=8", "trainer.micro_batch_size=2", "trainer.precision=bf16"),
        ("optimizer=galore", "trainer.batch_size=8", "model.loss_chunk_rows=null"),
        ("optimizer=adamw", "trainer.batch_size=1", "trainer.sequence_length=32"),
    )
]
CUT_FROM = ["model=llama_60m", "optimizer=adafrugal", "trainer.precision=bf16", "model.loss_chunk_rows=null",
            "trainer.batch_size=4", "trainer.sequence_length=256"]  # fmt: skip
MANY, FEW = (), ("trainer.batch_size=1", "trainer.sequence_length=32")
STEPS = 6
_ROUNDED = "optimizer.stochastic_rounding=true"
_EACH = {
    "`model.loss_chunk_rows=256`": ("model.loss_chunk_rows=256",),
    "`trainer.activation_checkpointing=selective`": ("trainer.activation_checkpointing=selective",),
    "`trainer.activation_checkpointing=layers`": ("trainer.activation_checkpointing=layers",),
    "`trainer.update_in_backward=true`": ("trainer.update_in_backward=true",),
    "`optimizer.state_dtype=bfloat16`": ("optimizer.state_dtype=bfloat16", _ROUNDED),
    "`model.dtype=bfloat16`": ("model.dtype=bfloat16", _ROUNDED),
}
ALL = ("model.loss_chunk_rows=256", "trainer.activation_checkpointing=layers", "trainer.update_in_backward=true",
       "optimizer.state_dtype=bfloat16", "model.dtype=bfloat16", _ROUNDED)  # fmt: skip
CUTS = {"none": (), **_EACH, "all of them (`layers`)": ALL}
_SEVEN = ("model=llama_7b", "trainer.batch_size=1", "trainer.sequence_length=256", "trainer.precision=bf16")
_HALF = ("model.dtype=bfloat16",)
SMALL = {
    "adamw": (*_SEVEN, "optimizer=adamw"),
    "adamw, all in bfloat16": (*_SEVEN, *_HALF, "optimizer=adamw"),
    "galore, all in bfloat16": (*_SEVEN, *_HALF, "optimizer=galore", "optimizer.state_dtype=bfloat16", _ROUNDED),
    "adafrugal, all of the settings above": (*_SEVEN, "optimizer=adafrugal", *ALL),
    "the same, `optimizer.density.fit_gib=15.5`": (
        *_SEVEN, "optimizer=adafrugal", *ALL, "optimizer.density.fit_gib=15.5",
    ),
}  # fmt: skip


def foretold(model: str, optimizer: str) -> dict[str, Any]:
    """One column, or two where ρ falls."""
    found = estimate(compose.settings([f"model=llama_{model}", f"optimizer={optimizer}", *SHAPE]))
    stages = [{"density": s.density, "state": s.peak.state, "peak": s.peak.total} for s in found.stages]
    return {"model": model, "optimizer": optimizer, "weights": found.peak.weights, "stages": stages}


def small(name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """What a model would take that no machine here could hold."""
    settings = compose.settings([CHUNKS, *words])
    if getattr(settings.optimizer, "fit_gib", None):
        settings = fit.beginning_with(settings, fit.fitted(settings).density)
    found = estimate(settings)
    parts = ("weights", "gradients", "state", "activations", "temporaries", "phase")
    peak = {part: getattr(found.peak, part) for part in parts}
    return {"name": name, "words": list(words), "density": found.stages[0].density, **peak, "total": found.peak.total}


class Real:
    """A run's model and optimizer, really made, and steps of them.

    Args:
        settings: of a pre-training run.
        device: where.
    """

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings = with_chunks(settled(settings, None, settings.model.hidden_size))
        trainer, self.device = self.settings.trainer, device
        self._rows = trainer.micro_batch_size or trainer.batch_size
        with torch.device(device):  # made where it is used: 7B on the CPU first would take minutes
            self.model = llama.build(self.settings.model)
        llama.attend_causally(self.model)
        checkpoint_activations(self.model, trainer.activation_checkpointing)
        self.optimizer = optimizers.build(self.settings, optimizers.groups(self.settings, self.model))
        if trainer.update_in_backward:
            UpdateInBackward(self.optimizer)
        self._nats = TokenNats(self.model, self.settings.model.loss_chunk_rows)
        self._tokens = torch.randint(0, 100, (self._rows, trainer.sequence_length), device=device)

    def step(self) -> None:
        """One step, of two micro-batches where it has more than one."""
        trainer = self.settings.trainer
        for _ in range(min(2, trainer.batch_size // self._rows)):
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=trainer.precision == "bf16"):
                loss = self._nats(self._tokens, self._tokens)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def allocated_at_most(settings: Settings, steps: int = 2) -> int:
    """Bytes that the steps of a run had at most, by the CPU allocator's own events as torch's profiler gives them."""
    gc.collect()  # what is freed later would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        real = Real(settings)
        for _ in range(steps):
            real.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del real
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def held_against(words: list[str]) -> dict[str, Any]:
    """An estimate, and what two real steps allocate; in a process that does nothing else."""
    settings = compose.settings([CHUNKS, *words])
    expected = estimate(settings).peak
    before = measure.read(torch.device("cpu"))["resident"]
    allocated = allocated_at_most(settings)
    resident = measure.read(torch.device("cpu"))["peak_resident"] - before
    found = {"estimate": expected.total, "phase": expected.phase, "allocated": allocated, "resident": resident}
    return {"words": words, **found}


def compared(words: list[str]) -> float:
    """The time of a step with these settings ÷ without the last of them, steps in turn; the median of some."""
    plain, cut = (Real(compose.settings(some)) for some in (CUT_FROM, words))
    ratios = []
    for _ in range(STEPS):
        seconds = []
        for real in (plain, cut):
            started = time.perf_counter()
            real.step()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[1:])  # the first makes the state


def cut(name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """What some settings save where activations are most of the peak, and where they are not, and what they cost."""
    found: dict[str, Any] = {"name": name, "words": list(words)}
    for tokens, more in (("many", MANY), ("few", FEW)):
        found[tokens] = _in_a_process("--measure", *CUT_FROM, *more, *words)
    found["time"] = _in_a_process("--compare", *CUT_FROM, *words)
    return found


def _in_a_process(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def estimates_table(rows: list[dict[str, Any]]) -> str:
    """GiB of optimizer state, and in parentheses of the peak, in Markdown."""
    weights = {row["model"]: row["weights"] for row in rows}
    cells = [["weights", *(_gib(weights[m]) for m in MODELS)]]
    for optimizer in OPTIMIZERS:
        found = {row["model"]: row["stages"] for row in rows if row["optimizer"] == optimizer}
        for place, stage in enumerate(found[MODELS[0]]):
            name = optimizer if stage["density"] is None else f"{optimizer}, ρ {stage['density']:.3g}"
            stages = [found[m][place] for m in MODELS]
            cells.append([name, *(f"{_gib(one['state'])} ({_gib(one['peak'])})" for one in stages)])
    return bench.markdown(" | ".join(["GiB", *map(str.upper, MODELS)]), cells)


def measured_table(rows: list[dict[str, Any]]) -> str:
    """MiB foretold and handed out, in Markdown."""
    cells = []
    for row in rows:
        error = f"{100 * (row['estimate'] / row['allocated'] - 1):+.1f}%"
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("estimate", "allocated", "resident")]
        cells.append([f"`{' '.join(row['words'])}`", *sizes[:2], error, sizes[2]])
    return bench.markdown("settings | estimate, MiB | allocated, MiB | error | resident, MiB", cells)


def cuts_table(rows: list[dict[str, Any]]) -> str:
    """MiB of the peak with each setting, and the time of a step, in Markdown."""
    each = " | ".join(f"{tokens} tokens: estimate, MiB | allocated | saved" for tokens in ("1,024", "32"))
    cells = []
    for row in rows:
        cells.append([row["name"]])
        for tokens in ("many", "few"):
            found, base = row[tokens], rows[0][tokens]
            saved = f"{1 - found['allocated'] / base['allocated']:.0%}"
            cells[-1] += [f"{found['estimate'] / 2**20:,.0f}", f"{found['allocated'] / 2**20:,.0f}", saved]
        cells[-1].append(f"{row['time']:.2f}")
    return bench.markdown(f"settings | {each} | time of a step", cells)


def small_table(rows: list[dict[str, Any]]) -> str:
    """GiB of the peak and of its parts, in Markdown."""
    parts = ("weights", "gradients", "state", "activations", "temporaries", "total")
    cells = []
    for row in rows:
        density = "" if row["density"] is None else f"{row['density']:.3g}"
        cells.append([row["name"], density, *(_gib(row[part]) for part in parts), row["phase"]])
    return bench.markdown(" | ".join(["GiB", "ρ at the start", *parts[:-1], "peak", "in"]), cells)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def main() -> None:
    """Estimate, measure, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure or given.compare:
        print(json.dumps(held_against(given.measure) if given.measure else compared(given.compare)))
        return
    found = {
        "estimates": [foretold(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS],
        "measured": [_in_a_process("--measure", *words) for words in MEASURED],
        "cuts": [cut(name, words) for name, words in CUTS.items()],
        "small": [small(name, words) for name, words in SMALL.items()],
        "kinds": memory_of_runs.all_kinds(),
    }
    tables = [estimates_table(found["estimates"]), measured_table(found["measured"]), cuts_table(found["cuts"])]
    tables.append(memory_of_runs.table(found["kinds"]))
    print("\n\n".join([*tables, small_table(found["small"])]))
    bench.keep(found, given.out)


if __name__ == "__main__":
    main()
