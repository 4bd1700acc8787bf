"""How near is the estimate of memory to what a device's allocator hands out? Real steps of each model, one at a time.

    python experiments/benchmarks/device_memory.py [--device cuda] [--cuts] [--only NAME …] [--json FILE]

On a GPU the peak is torch.cuda.max_memory_allocated, less what was allocated before the model was made; `reserved` is
what the allocator held, `used` what the driver counts for the card, other processes' with it. On a CPU, where a tiny
model stands in, it is the allocator's own events. With --cuts it is LLaMA 7B with every setting that lowers memory, at
two densities, and held to 15 GiB of the card. Without, the estimates of all cases, those of LLaMA 7B too, are made
meanwhile in other processes, since they take longer than the steps.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import bench
import torch
from memory import ALL, SHAPE, Real, allocated_at_most

from adafrugal.memory.estimate import estimate
from adafrugal.settings import compose
from adafrugal.training import devices

SIZES = ("60m", "130m", "350m", "1b")
OPTIMIZERS = ("adamw", "frugal", "badam", "galore")
SVD_UP_TO = ("60m", "130m")  # GaLore's first step takes an exact SVD of every matrix, minutes for the larger models
DENSITIES = {"ρ 0.06": ("optimizer=adafrugal", "optimizer.density.start=0.06"), "ρ 0": ("optimizer=signsgd",)}
LIMIT = "trainer.memory_limit_gib=15"
CODES = ("optimizer=adafrugal", "optimizer.density.start=0.05", "optimizer.state_dtype=int8")
HELD = {  # LLaMA 7B with moments in 8 bits: as the card allows, and as on a card of 16 GB, whatever the card
    "ρ 0.05, 8 bits": CODES,
    "ρ 0.05, held to 15 GiB": (*CODES, "optimizer.state_on=cpu_always_full", LIMIT),
}
CUT = ("model.loss_chunk_rows=256", "trainer.activation_checkpointing=layers", "trainer.update_in_backward=true")
FREE = {  # LLaMA 350M with AdamW as by default, and with AdaFRUGAL and cuts that do not change its result
    "350m adamw, by default": ("model=llama_350m", "optimizer=adamw", *SHAPE[1:]),
    "350m adafrugal, cut": ("model=llama_350m", "optimizer=adafrugal", *SHAPE[1:], *CUT),
}
TINY = ("model=llama_tiny", "data.tokenizer.vocabulary_size=512", "trainer.sequence_length=8", "trainer.batch_size=1")
ONE_ROW = ("trainer.precision=bf16", "trainer.batch_size=1", "trainer.sequence_length=256")
Words = tuple[str, ...]


def cases(device: str, cuts: bool) -> dict[str, Words]:
    """What is measured, by name: the settings of each run."""
    if cuts:
        model = ("model=llama_7b", *ONE_ROW) if device == "cuda" else (*TINY, "trainer.precision=bf16")
        rows = {name: (*model, *ALL, *more) for name, more in (DENSITIES | HELD).items()}
        return {name: tuple(w for w in words if device == "cuda" or w != LIMIT) for name, words in rows.items()}
    if device == "cpu":
        return {"tiny adamw": (*TINY, "trainer.precision=bf16", "optimizer=adamw")}
    return {
        f"{size} {optimizer}": (f"model=llama_{size}", f"optimizer={optimizer}", *SHAPE)
        for size in SIZES for optimizer in OPTIMIZERS if optimizer != "galore" or size in SVD_UP_TO
    } | FREE  # fmt: skip


def foretold(words: Words) -> dict[str, Any]:
    """The estimate of the peak, and the phase that it comes in."""
    peak = estimate(compose.settings(list(words))).peak
    return {"peak": peak.total, "phase": peak.phase}


def on_a_gpu(words: Words, steps: int) -> dict[str, Any]:
    """What some steps allocate at most, and the milliseconds of each."""
    settings = compose.settings(list(words))
    gc.collect()
    torch.cuda.empty_cache()
    devices.open_device(settings.trainer)  # holds it to its memory_limit_gib
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    real = Real(settings, "cuda")
    torch.cuda.synchronize()
    built, taken = time.perf_counter() - begun, []
    for _ in range(steps):
        begun = time.perf_counter()
        real.step()
        torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - begun))
    free, whole = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated() - before, "reserved": torch.cuda.max_memory_reserved(),
        "used": whole - free, "ms": taken, "built_s": built,
    }  # fmt: skip


def on_a_cpu(words: Words, steps: int) -> dict[str, Any]:
    """The same, as far as a CPU has it."""
    settings = compose.settings(list(words))
    begun = time.perf_counter()
    allocated = allocated_at_most(settings, steps)
    return {"allocated": allocated, "ms": [1000 * (time.perf_counter() - begun) / steps]}


def measured(words: Words, given: argparse.Namespace) -> dict[str, Any]:
    """A case really made; what it says where the card is too small for it."""
    try:
        return (on_a_gpu if given.device == "cuda" else on_a_cpu)(words, given.steps)
    except torch.OutOfMemoryError as error:
        return {"refused": str(error).partition(".")[0]}


def measure(given: argparse.Namespace) -> None:
    """Measure each case; print and keep it as soon as it is there, and its estimate when all are made."""
    wanted, cuts = cases(given.device, given.cuts), cases(given.device, True)
    if unknown := set(given.only or ()) - set(wanted):
        raise SystemExit(f"error: --only has no {min(unknown)!r}; allowed: {', '.join(wanted)}")
    wanted = {name: words for name, words in wanted.items() if name in (given.only or wanted)}
    if given.device == "cuda":
        torch.cuda.init()
        on_a_gpu((*TINY, "trainer.precision=bf16"), 1)  # cuBLAS keeps workspaces from its first call on
    found: dict[str, Any] = {"device": given.device, "rows": []}
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        first = {} if given.cuts else wanted
        if not (given.cuts or given.only):
            first = cuts | wanted  # LLaMA 7B takes longest
        estimates = {name: pool.submit(foretold, words) for name, words in first.items()}
        for name, words in wanted.items():
            found["rows"].append({"name": name, "words": list(words), **measured(words, given)})
            print(line(found["rows"][-1]), flush=True)
            bench.keep(found, given.json)
        found["foretold"] = {name: one.result() for name, one in estimates.items()}
    for name, peak in found["foretold"].items():
        print(f"{name:<12} {peak['peak'] / 2**20:,.1f} MiB foretold, in {peak['phase']}")
    bench.keep(found, given.json)


def line(row: dict[str, Any]) -> str:
    """A case in a line."""
    if "refused" in row:
        return f"{row['name']:<12} {row['refused']}"
    return f"{row['name']:<12} {row['allocated'] / 2**20:,.1f} MiB allocated, last step {row['ms'][-1]:.0f} ms"


def main() -> None:
    """Measure what is asked for."""
    parser = bench.parser(__doc__, device="cuda")
    parser.add_argument("--cuts", action="store_true", help="LLaMA 7B with every setting that lowers memory")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases by name, such as '350m adamw'")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that make estimates")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
