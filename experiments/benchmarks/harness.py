"""What does the training loop cost over a bare one? The same model, batches and optimizer, alternating in one process.

    python experiments/benchmarks/harness.py [--rounds 20]

Prints the milliseconds per step of both (medians over rounds of ten steps) and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from adafrugal import composition, config, optimizers
from adafrugal.optim import split_parameters
from adafrugal.tracking.record import Record
from adafrugal.training.devices import open_device
from adafrugal.training.display import Display
from adafrugal.training.loop import Loop
from adafrugal.training.pretrain import Pretrain
from adafrugal.training.schedule import factor


def settings(steps: int) -> config.Settings:
    """The default job with AdamW, its evaluations and checkpoints moved out of what is timed."""
    overrides = ["optimizer=adamw", f"trainer.steps={steps}", f"eval.every={steps + 1}", "tracking=local"]
    return composition.settings([*overrides, f"checkpoint.every={steps}"])


def harness(run: config.Settings, directory: Path) -> Callable[[int], None]:
    """The project's loop, one step a call; its record is really written."""
    task = Pretrain(run, open_device(run.trainer), print)
    optimizer = optimizers.build(run, split_parameters(task.model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(run.schedule, run.trainer.steps))
    record = Record(directory)
    record.begin({})
    loop = Loop(run, task, optimizer, scheduler, open_device(run.trainer), record, Display())
    return lambda step: loop.advance(loop.task.work(step))


def bare(run: config.Settings) -> Callable[[int], None]:
    """What one would write by hand: forward, loss, backward, fused AdamW."""
    task = Pretrain(run, open_device(run.trainer), print)
    model = task.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optimizer.lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(run.schedule, run.trainer.steps))
    batches = [task.work(step).batches[0] for step in range(1, run.trainer.steps + 1)]

    def step(number: int) -> None:
        batch = batches[number - 1]
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(loops: dict[str, Callable[[int], None]], numbers: range) -> dict[str, float]:
    """Seconds that each loop takes for the same steps, taken in turn step by step."""
    seconds = dict.fromkeys(loops, 0.0)
    for number in numbers:
        for name in list(loops)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            loops[name](number)
            seconds[name] += time.perf_counter() - started
    return seconds


def main() -> None:
    """Compare round by round; a round is as long as the harness's window, so that each has one line of metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    window = config.TrainerSettings().log_every
    run = settings((rounds + 1) * window + 1)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        loops = {"harness": harness(run, Path(directory)), "bare": bare(run)}
        for turn in range(rounds + 1):
            numbers = range(1 + turn * window, 1 + (turn + 1) * window)
            for name, taken in compare(loops, numbers).items():
                seconds.setdefault(name, []).append(taken / window)
    kept = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    ratios = [h / b for h, b in zip(kept["harness"], kept["bare"], strict=True)]
    for name, values in kept.items():
        print(f"{name:<8} {1000 * statistics.median(values):.1f} ms per step")
    print(f"ratio    {statistics.median(ratios):.4f} (rounds from {min(ratios):.4f} to {max(ratios):.4f})")


if __name__ == "__main__":
    main()
