"""Memory in use while a run goes on."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def read(device: torch.device, replays: bool = False) -> dict[str, int]:
    """Bytes in use now, and the largest since the call before this one.

    On CUDA: `allocated` and `peak` are what tensors take, `reserved` is what the allocator holds and does not give
    back. On a CPU: `resident` is the process's memory, `peak_resident` its largest since `begin`.

    Args:
        device: whose memory is read.
        replays: whether steps are replays of CUDA graphs, which allocate nothing: activations and gradients lie in
            memory that is reserved for them and is not counted as allocated. `peak` is then the most that was reserved.
    """
    if device.type == "cuda":
        found = {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": (torch.cuda.max_memory_reserved if replays else torch.cuda.max_memory_allocated)(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    status = Path("/proc/self/status")
    if not status.exists():
        return {"peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, most = (int(lines[name].split()[0]) * unit for name in ("VmRSS", "VmHWM"))
    return {"resident": now, "peak_resident": most}


def peak(found: dict[str, int]) -> int:
    """The largest of what `read` found: the window's peak on CUDA, the process's on a CPU."""
    return found.get("peak", found.get("peak_resident", 0))


def begin(device: torch.device) -> int:
    """Let peaks count from here, in a process that may have made other runs; the bytes in use now, to subtract."""
    if device.type == "cpu":
        with suppress(OSError):  # a system that has no such mark, or does not let it be set
            Path("/proc/self/clear_refs").write_text("5")
    found = read(device)
    return found.get("allocated", found.get("resident", 0))


def beside(estimate: int, peak: int, before: int) -> dict[str, float]:
    """An estimate of a run's peak, with its relative error against what was measured.

    Args:
        estimate: bytes of tensors.
        peak: the largest that was in use: on a CPU with all else that the process holds.
        before: what was in use before the model was made.
    """
    grown = peak - before
    return {"estimate": estimate, "grown": grown, "estimate_error": estimate / grown - 1 if grown > 0 else 0.0}
