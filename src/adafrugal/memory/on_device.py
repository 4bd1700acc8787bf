"""Choose the rows of logits made at once, and on a GPU the micro-batch, by the memory at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from adafrugal.settings.schema import Settings, TrainerSettings

if TYPE_CHECKING:
    from adafrugal.memory.trace import Footprint

LOGITS_ON_CPU = 2**28  # bytes of logits made at once
SHARE_OF_GPU = 32  # on a GPU a 32nd of its memory, since eager code takes six times the logits


def rows_at_once(trainer: TrainerSettings, processes: int = 1) -> int:
    """The rows of a micro-batch of one of so many processes, which an evaluation reads at once, too."""
    each = -(-trainer.batch_size // processes)
    return min(trainer.micro_batch_size or each, each)


def chunk_rows(settings: Settings, memory: int | None = None, processes: int = 1) -> int | None:
    """The rows of logits made at once; None for all of a micro-batch.

    `model.loss_chunk_rows=auto` has a budget in the type of the matrix products: 256 MiB, on a GPU a 32nd of its
    memory. More logits are cut into equal chunks, each of which is recomputed in the backward pass.

    Args:
        settings: of a pre-training run; its precision `auto` counts as fp32.
        memory: bytes of the GPU; None on a CPU.
        processes: that share a batch.
    """
    if settings.model.loss_chunk_rows != "auto":
        return settings.model.loss_chunk_rows
    trainer = settings.trainer
    rows = rows_at_once(trainer, processes) * trainer.sequence_length
    size = rows * settings.model.vocabulary_size * (2 if trainer.precision in ("bf16", "fp16") else 4)
    chunks = math.ceil(size / (memory // SHARE_OF_GPU if memory else LOGITS_ON_CPU))
    return None if chunks <= 1 else math.ceil(rows / chunks)


def with_chunks(settings: Settings, memory: int | None = None, processes: int = 1) -> Settings:
    """The same settings with `chunk_rows` in the place of `model.loss_chunk_rows=auto`."""
    if settings.task.kind != "pretrain":
        return settings
    rows = chunk_rows(settings, memory, processes)
    return replace(settings, model=replace(settings.model, loss_chunk_rows=rows))


def chooses_micro_batch(settings: Settings) -> bool:
    """Whether a GPU's memory decides the micro-batch: none is set, memory can be estimated, a batch can be divided."""
    trainer = settings.trainer
    return not (trainer.offload or trainer.update_in_backward) and trainer.micro_batch_size is None


def resolved(
    settings: Settings, precision: str, memory: int | None = None, free: int = 0, processes: int = 1
) -> Settings:
    """The settings with precision, micro-batch and rows of logits chosen for the device.

    Args:
        settings: as they were checked.
        precision: of the matrix products.
        memory: bytes of the GPU; None on a CPU, where a batch is not divided.
        free: bytes of it that are not in use.
        processes: that share a batch.
    """
    trainer = replace(settings.trainer, precision=precision)
    if memory and chooses_micro_batch(settings):
        from adafrugal.memory import card

        own = replace(settings, trainer=trainer if processes > 1 else replace(trainer, parallel="none", replicas=1))
        budget = card.of_settings(settings)

        def fits(peak: Footprint) -> bool:
            return card.held(peak) <= free and (budget is None or budget.holds(peak))  # the context is there already

        trainer = replace(trainer, micro_batch_size=micro_batch(own, memory, fits, processes))
    return with_chunks(replace(settings, trainer=trainer), memory, processes)


def micro_batch(
    settings: Settings, memory: int | None, fits: Callable[[Footprint], bool], processes: int = 1
) -> int:
    """The largest divisor of a process's batch, up to its micro-batch, whose estimated peak fits; 1 where none does.

    Only activations and logits grow with the rows, so that each estimate says which divisor to try next.
    """
    from adafrugal.memory.estimate import estimate

    size = settings.trainer.batch_size // processes
    rows = min(settings.trainer.micro_batch_size or size, size)
    while True:
        tried = replace(settings, trainer=replace(settings.trainer, micro_batch_size=rows))
        peak = estimate(with_chunks(tried, memory, processes)).peak
        if rows == 1 or fits(peak):
            return rows

        def with_rows(fewer: int, share: float = 1 / rows, whole: Footprint = peak) -> Footprint:
            activations, temporaries = (int(n * fewer * share) for n in (whole.activations, whole.temporaries))
            return replace(whole, activations=activations, temporaries=temporaries)

        rows = next((n for n in range(rows - 1, 0, -1) if size % n == 0 and fits(with_rows(n))), 1)
