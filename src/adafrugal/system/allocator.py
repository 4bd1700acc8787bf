"""How torch's allocator takes memory of a GPU."""

from __future__ import annotations

import os
import sys

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # the others are old names
GROW = "expandable_segments:True"


def grow_segments() -> None:
    """Let torch extend a segment of a GPU's memory, which leaves fewer gaps, unless the user has configured it.

    Call it before CUDA begins. Torch records CUDA graphs in such segments, too; graphs with NCCL in them can hang
    (pytorch#158029), and runs of several processes have none.
    """
    if sys.platform == "linux" and configured() is None:
        os.environ[VARIABLES[0]] = GROW


def configured() -> str | None:
    """What the environment says to torch's allocator; None if nothing."""
    return next((os.environ[name] for name in VARIABLES if name in os.environ), None)
