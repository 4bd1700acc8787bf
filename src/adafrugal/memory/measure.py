"""Measure memory while a run goes on."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def read(device: torch.device, replays: bool = False) -> dict[str, int]:
    """Read the bytes in use now, and the largest since the last call.

    On CUDA: `allocated` and `peak` of tensors, `reserved` by the allocator. On a CPU: `resident`, the process's memory,
    and `peak_resident`, its largest since `begin`.

    Args:
        device: whose memory is read.
        replays: steps are replays of CUDA graphs, whose activations and gradients lie in reserved memory and are not
            counted as allocated: `peak` is then the largest reserved size.
    """
    if device.type == "cuda":
        found = {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": (torch.cuda.max_memory_reserved if replays else torch.cuda.max_memory_allocated)(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
        return found
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {
        name: int(lines[key].split()[0]) * 1024 for name, key in (("resident", "VmRSS"), ("peak_resident", "VmHWM"))
    }


def peak(found: dict[str, int]) -> int:
    """The largest size in a reading: the window's on CUDA, the process's on a CPU."""
    return found.get("peak", found.get("peak_resident", 0))


def begin(device: torch.device) -> int:
    """Reset peak statistics; return the bytes in use, to subtract from later readings."""
    if device.type == "cpu":
        with suppress(OSError):  # not every system has a peak that can be reset
            Path("/proc/self/clear_refs").write_text("5")
    found = read(device)
    return found.get("allocated", found.get("resident", 0))
