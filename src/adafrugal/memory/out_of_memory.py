"""Explain an out-of-memory error: what lowers memory, in the order of what it costs, and how much by the estimate."""

from __future__ import annotations

import os
import resource

import torch

from adafrugal.memory import card
from adafrugal.settings.identity import differing
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import line

GIB = 2**30
_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")  # torch has no class for these
_LIBRARIES = 2 * GIB  # of a process's address space, which Python, torch and their threads take


def is_memory(error: BaseException) -> bool:
    """Whether an allocation was refused, on a GPU or a CPU."""
    is_said = isinstance(error, RuntimeError) and any(words in line(error) for words in _MESSAGES)
    return is_said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def reason(error: BaseException, settings: Settings) -> str | None:
    """Lines for a refused allocation: what was refused, and what lowers it; None for any other error.

    Args:
        error: that ended the run.
        settings: as they were completed for the device, if the run came so far.
    """
    if not is_memory(error):
        return None
    refused = f"memory was refused ({line(error)})"
    try:
        return f"{refused}; {_advice(settings)}"
    except Exception:  # of any kind: no estimate for such a run, or no memory for it
        return f"{refused}; what lowers it: {_names(settings)}, a smaller model; docs/memory.md has what each saves"


def _advice(settings: Settings) -> str:
    """The estimate, what there is for it, and a line for each setting that lowers it."""
    from adafrugal.memory.savings import cuts, foretold, takes

    room, is_gpu = _room(settings)
    peak = foretold(settings)
    size = takes(peak, is_gpu)
    head = f"by the estimate it takes {_gib(size)}, most in the {peak.phase} phase, and there are {_gib(room)}"
    if size <= room:
        return f"{head}, so that something else takes the rest; what lowers it: {_names(settings)}, a smaller model"
    if not (found := list(cuts(settings, room, is_gpu))):
        return f"{head}; what lowers it: {_names(settings)}, a smaller model"
    width = max(len(cut.words) for cut in found)
    lines, known_as = [f"{head}; each of these, with those above it, would leave"], differing(settings)
    for cut in found:
        other = ", another run" if differing(cut.settings) != known_as else ""
        left = "not estimated in the time"
        if cut.after is not None:
            before, size = size, takes(cut.after, is_gpu)
            left = f"{_gib(size)}, {(before - size) / GIB:.2f} less"
        lines.append(f"  {cut.words:<{width}}  {left}{other}")
    if size <= room:
        lines[-1] += ", which fits"
    elif found[-1].after is not None:
        lines[-1] += ", which does not fit yet: a shorter trainer.sequence_length, or a smaller model"
    if differing(found[0].settings) == known_as:
        lines.append("What does not make another run may be added to the same command, which then goes on.")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _room(settings: Settings) -> tuple[int, bool]:
    """Bytes that there are for tensors and what an allocator keeps beyond them, and whether they are a GPU's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        limit = settings.trainer.memory_limit_gib
        return room if limit is None else min(room, card.within_limit(limit)), True
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, (machine if limit == resource.RLIM_INFINITY else min(limit, machine)) - _LIBRARIES), False


def _names(settings: Settings) -> str:
    """What lowers memory in any run, with the values of this one."""
    t = settings.trainer
    lowers = [f"trainer.micro_batch_size (now {t.micro_batch_size or t.batch_size})"]
    lowers.append(f"trainer.sequence_length ({t.sequence_length})")
    if hasattr(settings.model, "loss_chunk_rows"):
        lowers.append(f"model.loss_chunk_rows ({settings.model.loss_chunk_rows or 'null'})")
    if t.activation_checkpointing == "none":
        lowers.append("trainer.activation_checkpointing=layers")
    if hasattr(settings.optimizer, "density"):
        lowers.append("optimizer.density")
    return ", ".join(lowers)
