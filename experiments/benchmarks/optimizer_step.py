r"""What does a step of each optimizer cost? Each is paired with torch's fused AdamW, in turn, in one process.

    python experiments/benchmarks/optimizer_step.py [--sizes 60m 130m 350m] [--only PATTERN …] [--others] \
        [--seconds 20] [--passes SIZE …] [--device cpu] [--json FILE]

The parameters are those of the papers' LLaMA shapes, fp32, with random gradients. For each optimizer:
milliseconds per step (median), the median of its ratios to the AdamW step beside it, the bytes that must move as a
share of AdamW's, the time they take (the floor), milliseconds of a refresh, and bytes of state. The bytes are 28 for
an entry with AdamW state (weight, gradient, two moments; all but the gradient are read and written), 16 if its moments
are in 8 bits, 12 for one without; the floor is at the bandwidth, measured beside each optimizer, of an addition in
place, which moves memory as an update does. With --passes, forward and backward passes of some sizes are timed, too,
after the steps.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for all, or luck decides who gets them
import bench
import torch
from torch.nn.functional import cross_entropy

from adafrugal.models import llama
from adafrugal.optim import Frugal, ParameterGroups, split_parameters, state_bytes
from adafrugal.settings import compose
from adafrugal.tracking import environment

FULL, FREE = 28, 12  # bytes per entry and step, fp32
ROWS = {"cuda": 128, "cpu": 2}  # of 256 tokens, for which forward and backward are timed
REPEATS = 4


@dataclass
class Row:
    """One line of the table; times in milliseconds."""

    size: str
    optimizer: str
    step: float
    ratio: float
    bytes_ratio: float | None
    floor: float | None
    refresh: float | None
    state_bytes: int
    rounds: int


def parameters(size: str, device: str) -> ParameterGroups:
    """The groups of a LLaMA of this size, filled with noise, each with a gradient."""
    shape = compose.settings([f"model=llama_{size}"]).model
    with torch.device("meta"):
        groups = split_parameters(llama.build(shape))
    generator = torch.Generator(device).manual_seed(0)
    for group in groups:
        group["params"] = [(name, _noise(p.shape, device, generator)) for name, p in group["params"]]
    return groups


def _noise(shape: torch.Size, device: str, generator: torch.Generator) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.randn(shape, device=device, generator=generator) * 0.02)
    param.grad = torch.randn(shape, device=device, generator=generator) * 1e-3
    return param


def copies(groups: ParameterGroups) -> list[dict[str, Any]]:
    """The groups as torch's own optimizers take them."""
    return [{"params": [p for _, p in group["params"]]} for group in groups]


Make = Callable[[ParameterGroups], torch.optim.Optimizer]


def ours(**settings: Any) -> Make:
    """A Frugal that refreshes once, at its first step."""
    return lambda groups: Frugal(groups, lr=1e-4, interval=10**9, **settings)


OURS: dict[str, Make] = {
    "frugal blocks 0.25": ours(density=0.25),
    "frugal blocks 0.25, int8": ours(density=0.25, state_dtype="int8"),
    "frugal blocks 0.25, by elements": ours(density=0.25, subspace={"kind": "blocks", "match": "elements"}),
    "frugal slab 0.25": ours(density=0.25, subspace="slab"),
    "frugal columns 0.25": ours(density=0.25, subspace="columns"),
    "frugal columns 0.25, int8": ours(density=0.25, subspace="columns", state_dtype="int8"),
    "frugal rows 0.25": ours(density=0.25, subspace="rows"),
    "frugal blocks 0.25, whiten": ours(density=0.25, state_free="whiten"),
    "frugal blocks 0.25, sinkhorn": ours(density=0.25, state_free="sinkhorn"),
    "frugal blocks 0.05": ours(density=0.05),
    "frugal 0 (signsgd)": ours(density=0.0),
    "frugal blocks 0.25, not compiled": ours(density=0.25, compile=False),
    "frugal slab 0.25, not compiled": ours(density=0.25, subspace="slab", compile=False),
    "frugal columns 0.25, not compiled": ours(density=0.25, subspace="columns", compile=False),
    "frugal 0, not compiled": ours(density=0.0, compile=False),
    "frugal randperm 0.25": ours(density=0.25, subspace="randperm"),
    "frugal randk 0.25": ours(density=0.25, subspace="randk"),
    "frugal random 0.25": ours(density=0.25, subspace="random"),
    "frugal svd 0.25, iterated": ours(density=0.25, subspace={"kind": "svd", "svd_method": "subspace_iteration"}),
    "frugal svd 0.25": ours(density=0.25, subspace="svd"),
    "lion": ours(density=1.0, state_full="lion", betas=(0.9, 0.99)),
}

TORCHS: dict[str, Make] = {
    "torch AdamW foreach": lambda groups: torch.optim.AdamW(copies(groups), lr=1e-4, foreach=True),
    "torch AdamW plain": lambda groups: torch.optim.AdamW(copies(groups), lr=1e-4, foreach=False),
    "torch Adafactor": lambda groups: torch.optim.Adafactor(copies(groups), lr=1e-4),
}


def outside() -> dict[str, Make]:
    """Other people's optimizers, those that are installed; with the settings of their own examples."""

    def low_rank(groups: ParameterGroups, **more: Any) -> list[dict[str, Any]]:
        matrices = [p for group in groups if group["split"] for _, p in group["params"]]
        rest = [p for group in groups if not group["split"] for _, p in group["params"]]
        rank = min(matrices[0].shape) // 4
        return [{"params": rest}, {"params": matrices, "rank": rank, "update_proj_gap": 10**9, "scale": 0.25, **more}]

    def galore(groups: ParameterGroups) -> torch.optim.Optimizer:
        from galore_torch import GaLoreAdamW

        return GaLoreAdamW(low_rank(groups, proj_type="std"), lr=1e-4)

    def apollo(groups: ParameterGroups) -> torch.optim.Optimizer:
        from apollo_torch import APOLLOAdamW

        return APOLLOAdamW(low_rank(groups, proj="random", scale_type="channel", proj_type="std"), lr=1e-4)

    def bitsandbytes(groups: ParameterGroups) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(copies(groups), lr=1e-4)

    def torchao(groups: ParameterGroups) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit

        return AdamW8bit(copies(groups), lr=1e-4)

    known = {"galore_torch": galore, "apollo_torch": apollo, "bitsandbytes": bitsandbytes, "torchao": torchao}
    names = {"bitsandbytes": "bitsandbytes AdamW8bit", "torchao": "torchao AdamW8bit"}
    return {names.get(name, name): make for name, make in known.items() if importlib.util.find_spec(name)}


def timed(work: Callable[[], Any], device: str) -> float:
    """Milliseconds, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def passes(size: str, device: str) -> dict[str, float]:
    """Tokens, and milliseconds of forward and backward over them; on a GPU in bf16, and compiled."""
    on_gpu, shape = device == "cuda", compose.settings([f"model=llama_{size}"]).model
    with torch.device(device):
        model = llama.build(shape)
        tokens = torch.randint(shape.vocabulary_size, (ROWS[device], 256))
    llama.attend_causally(model)

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), tokens.flatten())

    if on_gpu:  # layer by layer, since the whole takes minutes to compile
        loss_of = torch.compile(loss_of)
        for layer in model.model.layers:
            layer.compile()

    def work() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(model.model(input_ids=tokens, use_cache=False).last_hidden_state)
        loss.backward()
        model.zero_grad(set_to_none=True)

    times = [timed(work, device) for _ in range(8)]
    return {"tokens": tokens.numel(), "ms": statistics.median(times[3:])}


def bandwidth(device: str) -> float:
    """Bytes per millisecond of an addition in place: two tensors read, one written."""
    a, b = (torch.zeros(2**26, device=device) for _ in range(2))
    times = [timed(lambda: a.add_(b), device) for _ in range(12)]
    return 12 * a.numel() / statistics.median(times[2:])


def bytes_to_move(optimizer: torch.optim.Optimizer, groups: ParameterGroups) -> int | None:
    """Of a step; None where it is not known."""
    entries = sum(p.numel() for group in groups for _, p in group["params"])
    if isinstance(optimizer, torch.optim.AdamW):
        return FULL * entries
    if not isinstance(optimizer, Frugal) or optimizer.param_groups[0]["state_full"] != "adamw":
        return None
    return FREE * entries + 2 * sum(roles.get("moments", 0) for roles in optimizer.state_bytes().values())


def measure(size: str, name: str, make: Make, groups: ParameterGroups, seconds: float, device: str) -> Row:
    """Steps of an optimizer and of fused AdamW on the same parameters, in turn, for about so many seconds.

    Both are made anew several times, now one first and now the other, and share the moments of tensors that both
    update with AdamW: the memory that a tensor happens to get is not always equally fast.
    """
    steps: list[float] = []
    ratios: list[float] = []
    refreshes: list[float] = []
    floors: list[float] = []
    for turn in range(REPEATS):
        reference = torch.optim.AdamW(copies(groups), lr=1e-4, fused=True)
        if turn % 2:
            timed(reference.step, device)
        optimizer = make(groups)
        if isinstance(optimizer, Frugal):
            optimizer.register_refresh_hook(lambda event: refreshes.append(1000 * event.seconds))
        first = timed(optimizer.step, device)  # makes the state, and compiles
        timed(reference.step, device)
        share_moments(optimizer, reference, groups)
        for work in (optimizer, reference):
            timed(work.step, device)
        pair(optimizer, reference, steps, ratios, seconds / REPEATS, device)
        least, of_adamw = bytes_to_move(optimizer, groups), bytes_to_move(reference, groups)
        floors += [least / bandwidth(device)] if least else []
        total = state_bytes(optimizer).total
        del optimizer, reference
        gc.collect()
        if first > 1000 * seconds:  # a refresh takes longer than what is to be measured
            break
    middle = statistics.median
    return Row(
        size, name, middle(steps), middle(ratios), least / of_adamw if least else None,
        middle(floors) if floors else None, middle(refreshes) if refreshes else None, total, len(steps),
    )  # fmt: skip


def share_moments(optimizer: torch.optim.Optimizer, reference: torch.optim.Optimizer, groups: ParameterGroups) -> None:
    """Let both have the same memory for tensors that are not split."""
    for _, param in (pair for group in groups if not group["split"] for pair in group["params"]):
        for name in {"exp_avg", "exp_avg_sq"} & optimizer.state[param].keys():
            moment = optimizer.state[param][name]
            if type(moment) is torch.Tensor and moment.is_floating_point():  # else of several, as torchao's, or codes
                reference.state[param][name] = moment


def pair(
    optimizer: torch.optim.Optimizer, reference: torch.optim.Optimizer, steps: list[float], ratios: list[float],
    seconds: float, device: str,
) -> None:  # fmt: skip
    """Step the two in turn, three times or more; add what the first took and how that compares."""
    started, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - started < seconds:
        base, step = timed(reference.step, device), timed(optimizer.step, device)
        steps.append(step)
        ratios.append(step / base)
        done += 1


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    heads = "size | optimizer | ms per step | ÷ fused AdamW | bytes ÷ AdamW's | floor, ms | refresh, ms | state, MiB"
    cells = [(
        r.size, r.optimizer, f"{r.step:.1f}", f"{r.ratio:.2f}",
        f"{r.bytes_ratio:.2f}" if r.bytes_ratio else "", f"{r.floor:.1f}" if r.floor else "",
        f"{r.refresh:.1f}" if r.refresh is not None else "", f"{r.state_bytes / 2**20:.1f}",
    ) for r in rows]  # fmt: skip
    return bench.markdown(heads, cells, names=2)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu, gpu = environment.describe()["processor"], torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
        "torch": torch.__version__, "bandwidth_gb_per_s": round(bandwidth(device) / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    """Measure what is asked for; print the table as it grows."""
    parser = bench.parser(__doc__, device="cpu")
    parser.add_argument("--sizes", nargs="+", default=["60m", "130m", "350m"])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns for their names: 'frugal *' '*slab*'")
    parser.add_argument("--others", action="store_true", help="torch's other optimizers, and libraries that are there")
    parser.add_argument("--seconds", type=float, default=20, help="for each optimizer and size")
    parser.add_argument("--passes", nargs="+", default=[], metavar="SIZE", help="time forward and backward of these")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(given.device), "rows": [], "passes": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None))
    print(table([]))
    for size in given.sizes:
        groups = parameters(size, given.device)
        for name, make in (OURS | (TORCHS | outside() if given.others else {})).items():
            if any(fnmatch(name, pattern) for pattern in given.only):
                row = measure(size, name, make, groups, given.seconds, given.device)
                print(table([row]).splitlines()[-1], flush=True)
                found["rows"].append(asdict(row))
                bench.keep(found, given.json)
    for size in given.passes:
        found["passes"][size] = passes(size, given.device)
        print("{}: forward and backward of {tokens} tokens take {ms:.1f} ms".format(size, **found["passes"][size]))
        bench.keep(found, given.json)


if __name__ == "__main__":
    main()
