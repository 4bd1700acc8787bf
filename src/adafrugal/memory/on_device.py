"""What the memory at hand decides: whether the loss is made in one piece, and the micro-batch on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from adafrugal.settings.schema import Settings

if TYPE_CHECKING:
    from adafrugal.memory.trace import Footprint

LOGITS_ON_CPU = 2**28  # bytes of logits that are made at once
SHARE_OF_GPU = 32  # on a GPU, so many parts of its memory are one such piece: eager code takes six times the piece
RESERVED = 1.15  # bytes that the allocator of a GPU takes ÷ bytes of tensors; 1.04 to 1.15 measured


def chunk_rows(settings: Settings, memory: int | None = None, processes: int = 1) -> int | None:
    """The rows of logits that are made at once: as `model.loss_chunk_rows` says, or as many as fit its budget.

    The budget of `auto` is 256 MiB of logits in the type of the matrix products; on a GPU a 32nd of its memory. What
    fits is made in one piece (None), more is cut into equal chunks, each of which is made again in the backward pass.

    Args:
        settings: of a pre-training run; its precision `auto` counts as fp32.
        memory: bytes of the GPU; None on a CPU.
        processes: that share a batch.
    """
    given = settings.model.loss_chunk_rows
    if given != "auto":
        return given
    trainer = settings.trainer
    each = -(-trainer.batch_size // processes)
    rows = min(trainer.micro_batch_size or each, each) * trainer.sequence_length
    size = rows * settings.model.vocabulary_size * (2 if trainer.precision in ("bf16", "fp16") else 4)
    pieces = math.ceil(size / (memory // SHARE_OF_GPU if memory else LOGITS_ON_CPU))
    return None if pieces <= 1 else math.ceil(rows / pieces)


def with_chunks(settings: Settings, memory: int | None = None, processes: int = 1) -> Settings:
    """The same settings with the number that `model.loss_chunk_rows=auto` comes to."""
    if settings.task.kind != "pretrain":
        return settings
    rows = chunk_rows(settings, memory, processes)
    return replace(settings, model=replace(settings.model, loss_chunk_rows=rows))


def chooses_micro_batch(settings: Settings) -> bool:
    """Whether a GPU's memory decides the micro-batch: it is not set, can be estimated, and a batch can be divided."""
    trainer = settings.trainer
    is_estimated = settings.task.kind == "pretrain" and trainer.parallel != "fsdp"
    return is_estimated and not trainer.update_in_backward and trainer.micro_batch_size is None


def resolved(
    settings: Settings, precision: str, memory: int | None = None, free: int = 0, processes: int = 1
) -> Settings:
    """The settings of a run with what is left to the device: precision, micro-batch, rows of logits.

    Args:
        settings: as they were checked.
        precision: of the matrix products.
        memory: bytes of the GPU; None on a CPU, where a batch is not divided.
        free: bytes of it that nobody uses.
        processes: that share a batch.
    """
    trainer = replace(settings.trainer, precision=precision)
    found = replace(settings, trainer=trainer)
    if memory and chooses_micro_batch(settings):
        from adafrugal.memory.estimate import estimate

        own = replace(found, trainer=replace(trainer, batch_size=trainer.batch_size // processes))
        if (budget := getattr(settings.optimizer, "fit_gib", None)) is not None:  # without what is only reserved
            free = min(free, int(budget * 2**30 * RESERVED))
        rows = with_micro_batch(own, lambda given: estimate(given).peak, memory, free).trainer.micro_batch_size
        found = replace(found, trainer=replace(trainer, micro_batch_size=rows))
    return with_chunks(found, memory, processes)


def with_micro_batch(settings: Settings, peak: Callable[[Settings], Footprint], memory: int, free: int) -> Settings:
    """The same settings with the largest divisor of the batch as micro-batch whose estimated peak fits.

    Activations and logits grow with the rows of a micro-batch and nothing else does, so that one estimate tells where
    the next has to be made.

    Args:
        settings: of one process, without a micro-batch.
        peak: the estimate, of settings that have one.
        memory: bytes of the GPU.
        free: bytes of it that nobody uses.
    """
    size, limit = settings.trainer.batch_size, free / RESERVED
    divisors = [n for n in range(size, 0, -1) if size % n == 0]
    rows = size
    while True:
        chosen = replace(settings, trainer=replace(settings.trainer, micro_batch_size=rows))
        found = peak(with_chunks(chosen, memory))
        if found.total <= limit or rows == 1:
            return chosen
        grows = (found.activations + found.temporaries) / rows
        fits = (limit - (found.total - grows * rows)) / grows
        rows = next((n for n in divisors if n < rows and n <= fits), 1)
