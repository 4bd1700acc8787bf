"""A refused allocation, in words that say what lowers memory."""

from __future__ import annotations

import torch

from adafrugal.config import Settings


def reason(error: BaseException, settings: Settings) -> str | None:
    """One line for an allocation that was refused, on a GPU or a CPU; None for any other error.

    Args:
        error: as torch or Python raised it.
        settings: of the run, whose values stand in the line.
    """
    text = " ".join(str(error).split())
    # torch has no class for these
    said = any(words in text for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory"))
    if not ((isinstance(error, RuntimeError) and said) or isinstance(error, MemoryError | torch.OutOfMemoryError)):
        return None
    t = settings.trainer
    lowers = [f"trainer.micro_batch_size (now {t.micro_batch_size or t.batch_size})"]
    lowers.append(f"trainer.sequence_length ({t.sequence_length})")
    if hasattr(settings.model, "loss_chunk_rows"):
        lowers.append(f"model.loss_chunk_rows ({settings.model.loss_chunk_rows or 'null'}; 1024 is a fair choice)")
    if hasattr(settings.optimizer, "density"):
        lowers.append("optimizer.density")
    return f"memory was refused ({text or type(error).__name__}); what lowers it: {', '.join(lowers)}, a smaller model"
