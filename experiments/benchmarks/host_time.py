"""What does the Python of a step on a GPU take? Measured on a CPU: all of `Frugal.step` but the launch itself.

    python experiments/benchmarks/host_time.py [--sizes 60m 130m 350m] [--json FILE]

Tables, pointers and clocks are those of a GPU; the kernel's launch is replaced by a function that does nothing. A step
with gradients that lie where they did, and one whose gradients have moved, so that their pointers are sent again (here
without pinned memory). Medians of milliseconds, beside torch's fused AdamW on tensors of no entries.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import bench
import torch

from adafrugal.models import llama
from adafrugal.optim import Frugal, split_parameters
from adafrugal.optim.kernels import one_pass, tables
from adafrugal.settings import compose

STEPS = 200
ARMS: dict[str, dict[str, Any]] = {
    **{f"{kind}, ρ 0.25": {"subspace": kind} for kind in ("blocks", "slab", "rows", "columns")},
    "ρ 0": {"density": 0.0},
}


class _NoLaunch:
    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *given, **options: None


def parameters(size: str) -> list[dict[str, Any]]:
    """Return the groups of a LLaMA of this size, whose tensors share one memory that nobody writes."""
    with torch.device("meta"):
        groups = split_parameters(llama.build(compose.settings([f"model=llama_{size}"]).model))
    most = max(p.numel() for group in groups for _, p in group["params"])
    memory = torch.zeros(most)
    for group in groups:
        group["params"] = [torch.nn.Parameter(memory[: p.numel()].view(p.shape)) for _, p in group["params"]]
    return list(groups)


def milliseconds(step: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Return the median time of a step, without what is done before it."""
    times = []
    for _ in range(STEPS):
        before()
        started = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def measure(size: str, arm: dict[str, Any]) -> list[float]:
    """Return milliseconds of a step with gradients in their place, and with gradients that moved."""
    groups = parameters(size)
    params = [param for group in groups for param in group["params"]]
    places = [[param.detach(), param.detach().clone()] for param in params]

    def swap() -> None:
        for param, place in zip(params, places, strict=True):
            place.reverse()
            param.grad = place[0]

    swap()
    optimizer = Frugal(groups, interval=10**9, **arm)
    optimizer.step()
    return [milliseconds(optimizer.step), milliseconds(optimizer.step, swap)]


def adamw(size: str) -> float:
    """Return milliseconds of torch's fused AdamW over as many tensors, without entries."""
    params = [torch.nn.Parameter(torch.empty(0)) for group in parameters(size) for _ in group["params"]]
    for param in params:
        param.grad = torch.empty(0)
    optimizer = torch.optim.AdamW(params, fused=True)
    return milliseconds(optimizer.step)


def main() -> None:
    """Measure what is asked for; print the table."""
    parser = bench.parser(__doc__, device=None)
    parser.add_argument("--sizes", nargs="+", default=["60m", "130m", "350m"])
    given = parser.parse_args()
    one_pass.step, tables.work_on = _NoLaunch(), lambda device: True
    rows = [
        {"size": size, "arm": name, "kept": kept, "moved": moved, "adamw": base}
        for size in given.sizes
        for base in [adamw(size)]
        for name, arm in ARMS.items()
        for kept, moved in [measure(size, arm)]
    ]
    cells = [(r["size"], r["arm"], *(f"{r[name]:.3f}" for name in ("kept", "moved", "adamw"))) for r in rows]
    print(bench.markdown("size | optimizer | gradients kept | gradients moved | fused AdamW", cells, names=2))
    bench.keep({"rows": rows}, given.json)


if __name__ == "__main__":
    main()
