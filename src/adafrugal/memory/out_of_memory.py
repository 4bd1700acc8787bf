"""A refused allocation, in words that say what lowers memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from adafrugal.settings.schema import Settings
from adafrugal.settings.validate import refuse_impossible
from adafrugal.system.errors import SettingError


def is_memory(error: BaseException) -> bool:
    """Whether an error is of memory that was refused, on a GPU or a CPU."""
    # torch has no class for these
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    is_said = isinstance(error, RuntimeError) and any(words in _line(error) for words in said)
    return is_said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def reason(error: BaseException, settings: Settings) -> str | None:
    """One line for an allocation that was refused; None for any other error.

    Args:
        error: as torch or Python raised it.
        settings: of the run, whose values stand in the line.
    """
    if not is_memory(error):
        return None
    t = settings.trainer
    o = settings.optimizer
    lowers = [f"trainer.micro_batch_size (now {t.micro_batch_size or t.batch_size})"]
    lowers.append(f"trainer.sequence_length ({t.sequence_length})")
    if hasattr(settings.model, "loss_chunk_rows"):
        lowers.append(f"model.loss_chunk_rows ({settings.model.loss_chunk_rows or 'null'}; 1024 is a fair choice)")
    if t.activation_checkpointing == "none":
        lowers.append("trainer.activation_checkpointing=layers")
    if not t.update_in_backward and _is_possible(replace(settings, trainer=replace(t, update_in_backward=True))):
        lowers.append("trainer.update_in_backward=true")
    if hasattr(o, "density"):
        lowers.append("optimizer.density")
    said = _line(error) or type(error).__name__
    return f"memory was refused ({said}); what lowers it: {', '.join(lowers)}, a smaller model{_foretold(settings)}"


def _is_possible(settings: Settings) -> bool:
    try:
        refuse_impossible(settings)
    except SettingError:
        return False
    return True


def _foretold(settings: Settings) -> str:
    """The estimate of the peak, for a task that has one."""
    if settings.task.kind != "pretrain":
        return ""
    from adafrugal.memory.estimate import estimate

    ahead = "; `python -m adafrugal.memory` says what fits"
    try:
        peak = estimate(settings).peak
    except Exception:  # there may be no memory left for it, either
        return ahead
    return f"; the estimate of the peak is {peak.total / 2**30:.2f} GiB, in the {peak.phase} phase{ahead}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
