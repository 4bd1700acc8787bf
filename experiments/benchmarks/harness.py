r"""What does the training loop cost over a bare one? The same model, batches and settings, in turn in one process.

    python experiments/benchmarks/harness.py [--rounds 20]
    python experiments/benchmarks/harness.py --device cuda --model llama_60m --batch 128 --length 256 \
        --precision bf16 --optimizers adamw frugal --rounds 6 --steps 25

The bare loop is what one would write by hand, with torch's fused AdamW and its batches on the device; on a GPU it
compiles forward and loss inside autocast. A round is so many steps of each loop: the loops take turns step by step on
a CPU, and round by round on a GPU, which works while the host goes on. Prints the median over rounds of the
milliseconds per step and of the ratios to the bare loop.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adafrugal.data.rows import Batch
from adafrugal.memory import on_device
from adafrugal.memory.estimate import estimate
from adafrugal.models import llama, optimizers
from adafrugal.settings import compose, schema
from adafrugal.settings.canonical import settled
from adafrugal.settings.schedule import factor
from adafrugal.tracking.record import Record
from adafrugal.training import devices
from adafrugal.training.devices import Place
from adafrugal.training.display import Display
from adafrugal.training.loop import Loop
from adafrugal.training.tasks.pretrain import Pretrain


@dataclass
class Contender:
    """A loop that is timed.

    Args:
        about: what identifies it in the results.
        step: makes one step, by its number.
        place: where it computes.
        record: what it writes; the bare loop has none.
        run: its settings, with what was left to the device; the bare loop has none.
        compile_seconds: what compiling took, or the first step where that compiles.
        peak: bytes of tensors at most while it was made and warmed up, less what was there before.
        taken: seconds of each round.
    """

    about: dict[str, Any]
    step: Callable[[int], None]
    place: Place
    record: Record | None = None
    run: schema.Settings | None = None
    compile_seconds: float | None = None
    peak: int | None = None
    taken: list[float] = field(default_factory=list)

    def go(self, numbers: Sequence[int]) -> float:
        """Seconds that some steps take, the device's work included."""
        started = time.perf_counter()
        for number in numbers:
            self.step(number)
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def settings(given: argparse.Namespace, optimizer: str) -> schema.Settings:
    """A run of as many steps as are made; evaluations and checkpoints are moved out of what is timed."""
    steps = (given.rounds + 1) * given.steps + 1
    words = [f"optimizer={optimizer}", f"model={given.model}", f"trainer.device={given.device}", "tracking=local",
             f"trainer.precision={given.precision}", f"trainer.batch_size={given.batch}",
             f"trainer.sequence_length={given.length}", f"trainer.steps={steps}", f"trainer.log_every={given.steps}",
             f"eval.every={steps + 1}", f"checkpoint.every={steps}", f"cache_root={given.cache}"]  # fmt: skip
    return compose.settings([*words, *given.set])


def started(run: schema.Settings, directory: Path) -> Loop:
    """The project's loop as train.py makes it."""
    place = devices.open_device(run.trainer)
    run = on_device.resolved(run, place.precision, place.memory(), place.free())
    task = Pretrain(run, place, print)
    run = settled(run, task.epoch, task.model.config.hidden_size)
    optimizer = optimizers.build(run, optimizers.groups(run, task.model))
    record = Record(directory)
    record.begin({})
    loop = Loop(run, task, optimizer, record, Display(), {})
    loop.compile(print)
    return loop


def harness(run: schema.Settings, optimizer: str, directory: Path) -> Contender:
    """The project's loop, one step a call; its record is really written."""
    loop = started(run, directory)
    how = loop.compilation
    about = {"loop": "train.py", "optimizer": optimizer, "mode": how.mode, "as_it_comes": True}
    about["loss_chunk_rows"] = loop.settings.model.loss_chunk_rows

    def step(number: int) -> None:
        loop.advance(loop.task.work(number))

    return Contender(about, step, loop.place, loop.record, loop.settings, how.seconds or None)


def bare(run: schema.Settings, mode: str | None, place: Place) -> Contender:
    """What one would write by hand: forward, loss, backward, fused AdamW."""
    task = Pretrain(run, place, print)
    batches = [task.work(step).batches[0].to(place.device) for step in range(1, min(run.trainer.steps, 65))]
    task.close()
    torch.manual_seed(run.seed)
    with place.device:
        model = llama.build(run.model)
    llama.attend_causally(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optimizer.lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(run.schedule, run.trainer.steps))

    def forward(batch: Batch) -> Tensor:
        with place.autocast():
            logits = model(input_ids=batch.tokens, use_cache=False).logits
            return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())

    loss_of = torch.compile(forward, mode=mode) if mode else forward

    def step(number: int) -> None:
        loss_of(batches[(number - 1) % len(batches)]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    about = {"loop": "bare", "optimizer": "adamw", "mode": mode, "loss_chunk_rows": None}
    return Contender(about, step, place)


def warmed(make: Callable[[], Contender], steps: int) -> Contender:
    """A loop that has made its first round, with what that and its making took in seconds and bytes."""
    on_gpu, before = torch.cuda.is_initialized(), 0
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    made = make()
    first = made.go([1])
    if made.about["mode"] and made.compile_seconds is None:
        made.compile_seconds = first
    made.go(range(2, steps + 1))
    if made.place.device.type == "cuda":
        made.peak = torch.cuda.max_memory_allocated() - before
    return made


def compare(contenders: Sequence[Contender], rounds: int, steps: int) -> None:
    """Time the loops round by round; a round is as long as the record's window, so that each has one line of it."""
    in_turn = 1 if contenders[0].place.device.type == "cpu" else steps
    for turn in range(1, rounds + 1):
        taken = dict.fromkeys(range(len(contenders)), 0.0)
        for number in range(1 + turn * steps, 1 + (turn + 1) * steps, in_turn):
            for index in list(taken)[:: 1 if (number // in_turn) % 2 else -1]:
                taken[index] += contenders[index].go(range(number, number + in_turn))
        for index, seconds in taken.items():
            contenders[index].taken.append(seconds / steps)


def result(one: Contender, base: Contender, given: argparse.Namespace) -> dict[str, Any]:
    """What was found of a loop, the times of its phases with it."""
    ratios = [a / b for a, b in zip(one.taken, base.taken, strict=True)]
    seconds = statistics.median(one.taken)
    found = one.about | {
        "ms": 1000 * seconds, "tokens_per_s": given.batch * given.length / seconds,
        "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)],
        "peak": one.peak, "compile_seconds": one.compile_seconds,
    }  # fmt: skip
    if one.record is not None and one.run is not None:
        lines = one.record.metrics()[1:]  # the first is of the round that warms up
        phases = [phase for phase in lines[0]["seconds"] if phase not in ("wall", "compile")]
        found["phases_ms"] = {
            phase: 1000 * statistics.median(line["seconds"][phase] for line in lines) / given.steps for phase in phases
        }
        found["estimate"] = estimate(one.run).peak.total
    return found


def measure(given: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Time every loop that is asked for, and the bare one."""
    runs = {name: settings(given, name) for name in given.optimizers}
    ours = [
        warmed(lambda name=name, run=run: harness(run, name, directory / name), given.steps)
        for name, run in runs.items()
    ]
    mode = ours[0].about["mode"] or ("default" if given.device == "cuda" else None)
    base = warmed(lambda: bare(next(iter(runs.values())), mode, ours[0].place), given.steps)
    contenders = [base, *ours]
    compare(contenders, given.rounds, given.steps)
    with torch.device("meta"):
        model = llama.build(next(iter(runs.values())).model)
    return {
        "model": given.model, "batch": given.batch, "length": given.length, "precision": base.place.precision,
        "device": given.device, "rounds": given.rounds, "steps": given.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "input_embedding": model.get_input_embeddings().weight.numel(),
        "loops": [result(one, base, given) for one in contenders],
    }  # fmt: skip


def line(one: dict[str, Any]) -> str:
    """A loop in a line."""
    low, high = one["ratios"]
    name = f"{one['loop']} {one['optimizer']}"
    return (
        f"{name:<18} {one['ms']:.1f} ms per step, {one['tokens_per_s']:,.0f} tokens/s, "
        f"{one['ratio']:.4f} of the bare loop (rounds from {low:.4f} to {high:.4f})"
    )


def main() -> None:
    """Compare, print, and keep what was found."""
    parser = bench.parser(__doc__, device="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of each loop in a round")
    parser.add_argument("--model", default="llama_3m", help="a file of conf/model")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], help="of the project's loop; the bare has AdamW")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of both loops")
    parser.add_argument("--cache", type=Path, default=compose.REPOSITORY / "cache")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(given, Path(directory))
    print("\n".join(line(one) for one in found["loops"]))
    bench.keep(found, given.json)


if __name__ == "__main__":
    main()
