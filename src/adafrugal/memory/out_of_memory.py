"""Explain an out-of-memory error in one line that says what lowers memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from adafrugal.settings.compose import refuse_impossible
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError, line

_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")  # torch has no class for these


def is_memory(error: BaseException) -> bool:
    """Whether an allocation was refused, on a GPU or a CPU."""
    is_said = isinstance(error, RuntimeError) and any(words in line(error) for words in _MESSAGES)
    return is_said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def reason(error: BaseException, settings: Settings) -> str | None:
    """One line for a refused allocation, with the values of the run's settings; None for any other error."""
    if not is_memory(error):
        return None
    t = settings.trainer
    lowers = [f"trainer.micro_batch_size (now {t.micro_batch_size or t.batch_size})"]
    lowers.append(f"trainer.sequence_length ({t.sequence_length})")
    if hasattr(settings.model, "loss_chunk_rows"):
        lowers.append(f"model.loss_chunk_rows ({settings.model.loss_chunk_rows or 'null'}; 1024 is a fair choice)")
    if t.activation_checkpointing == "none":
        lowers.append("trainer.activation_checkpointing=layers")
    if not t.update_in_backward:
        with suppress(SettingError):
            refuse_impossible(replace(settings, trainer=replace(t, update_in_backward=True)))
            lowers.append("trainer.update_in_backward=true")
    if hasattr(settings.optimizer, "density"):
        lowers.append("optimizer.density")
    lowered = f"what lowers it: {', '.join(lowers)}, a smaller model"
    return f"memory was refused ({line(error)}); {lowered}{_estimated(settings)}"


def _estimated(settings: Settings) -> str:
    """The estimate of the peak, for a task that has one."""
    if settings.task.kind != "pretrain":
        return ""
    from adafrugal.memory.estimate import estimate

    ahead = "; `python -m adafrugal.memory` says what fits"
    try:
        peak = estimate(settings).peak
    except Exception:  # there may be no memory for it
        return ahead
    return f"; the estimate of the peak is {peak.total / 2**30:.2f} GiB, in the {peak.phase} phase{ahead}"
