"""Make a few steps of a run, to know how long all of it takes. Writes nothing; pre-training needs no data."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adafrugal.data.batches import Validation
from adafrugal.data.rows import Batch
from adafrugal.memory import fit, on_device, out_of_memory
from adafrugal.models import optimizers
from adafrugal.settings.canonical import settled
from adafrugal.settings.schema import Settings
from adafrugal.tracking.record import Unwritten
from adafrugal.training import devices, tasks
from adafrugal.training.display import Display
from adafrugal.training.distributed.ranks import Ranks
from adafrugal.training.loop import Loop
from adafrugal.training.tasks.pretrain import Pretrain

STEPS, WARM_UP = 20, 4  # the first few steps are slower: memory is allocated, kernels are chosen
ENOUGH = 60.0  # seconds, after which steps that take long are no more than WARM_UP and one


@dataclass(frozen=True)
class Measured:
    """What some steps took on a device, in seconds."""

    arm: str | None
    device: str
    steps: int  # made
    step: float  # the median after the first few, without refreshes
    refresh: float  # of the first step
    evaluated: float  # for each token of an evaluation

    def seconds(self, steps: int, refreshes: int, evaluated_tokens: int) -> float:
        """Return the seconds of a run: steps, refreshes and evaluations."""
        return steps * self.step + refreshes * self.refresh + evaluated_tokens * self.evaluated


def measure(settings: Settings) -> Measured | str:
    """Make steps on random tokens, on the device of the settings, and one pass of an evaluation.

    A run of several processes is measured in one, which has the whole batch. Return the reason if memory is refused.
    """
    alone = replace(settings.trainer, parallel="none", replicas=1, offload=False)
    try:
        return _measured(replace(settings, trainer=alone, model=replace(settings.model, weights=None)))
    except (RuntimeError, MemoryError) as error:
        if out_of_memory.is_memory(error):
            return f"{settings.arm} does not fit into the memory here"
        raise
    finally:
        gc.collect()  # the next optimizer needs the memory


def _measured(settings: Settings) -> Measured:
    loop = prepared(settings)
    task, place = loop.task, loop.place
    loop.compile(_say)
    walls, refresh, begun = [], 0.0, time.perf_counter()
    for step in range(1, STEPS + 1):
        started = time.perf_counter()
        loop._train_step(task.work(step))
        phases = loop.clock.take()  # waits for a GPU
        walls.append(time.perf_counter() - started - phases["refresh"])
        refresh = refresh or phases["refresh"]
        if step > WARM_UP and time.perf_counter() - begun > ENOUGH:
            break
    median = statistics.median(walls[WARM_UP:])
    found = Measured(settings.arm, place.name(), len(walls), median, refresh, _evaluation(task))
    if loop.compilation.mode:
        torch.compiler.reset()
    return found


def prepared(settings: Settings, ranks: Ranks | None = None) -> Loop:
    """Return the loop of a run before its first step, which writes nothing and, in pre-training, reads random tokens.

    Args:
        settings: checked.
        ranks: the processes of the run, which have met; None: it has one.
    """
    size, local = (ranks.size, ranks.local) if ranks else (1, 0)
    place = devices.open_device(settings.trainer, local)
    on_here = on_device.resolved(tasks.sized(settings), place.precision, place.memory(), place.free(), size)
    kind = _RandomText if settings.task.kind == "pretrain" else tasks.named(settings.task.kind)
    task = kind(on_here, place, _say, None, ranks)
    chosen = fit.within_budget(settled(on_here, task.epoch, task.model.config.hidden_size))
    optimizers.adapt(chosen, task.model)
    optimizer = optimizers.build(chosen, optimizers.groups(chosen, task.model))
    return Loop(chosen, task, optimizer, Unwritten(Path(os.devnull)), Display(), {})


def _evaluation(task: _RandomText) -> float:
    """Return the seconds of an evaluation for each of its tokens."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        task.evaluate(last=False)  # reads the loss, so that it waits for a GPU
        taken.append(time.perf_counter() - started)
    return min(taken) / task.rows_of_evaluation


def _say(text: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class _Tokens:
    """A corpus of one batch of random tokens."""

    batch: Batch
    validation: Validation

    def batches(self, step: int) -> Batch:
        return self.batch


class _RandomText(Pretrain):
    """Pre-training on random tokens."""

    def _text(self, settings: Settings, say: Callable[[str], None], state: dict[str, Any] | None) -> Any:
        trainer, generator = settings.trainer, torch.Generator().manual_seed(settings.seed)
        shape, length = (trainer.batch_size, trainer.sequence_length), trainer.sequence_length
        tokens = torch.randint(settings.model.vocabulary_size, shape, generator=generator)
        # two documents in a row, so that attention is masked as in a run
        positions = (torch.arange(length) % -(-length // 2)).expand(shape) if settings.data.mask_documents else None
        batch = Batch(tokens, tokens.roll(-1, 1), torch.full(shape[:1], length), positions).ready(self.place.is_gpu)
        rows = next(batch.split(on_device.rows_at_once(trainer, self.ranks.size) * self.ranks.size))
        self.rows_of_evaluation = rows.tokens.numel()
        return _Tokens(batch, Validation([rows], rows.count(), rows.count()))

    def _padding(self) -> int:
        """Return the id for padding of most tokenizers."""
        return 0

    def _make_whole(self, *_: Any) -> None:
        """Make no tokenizer's files: nothing is saved."""
