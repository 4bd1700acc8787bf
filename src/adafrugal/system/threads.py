"""How torch's threads wait for each other on a CPU."""

from __future__ import annotations

import os

SPINS = "2000"  # some microseconds


def wait_asleep() -> None:
    """Let waiting threads sleep after some microseconds, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT say otherwise.

    Call it before torch is imported. By default they spin for milliseconds, which slows a step beside another process;
    with OMP_WAIT_POLICY=PASSIVE they sleep at once, which slows a step that is alone (docs/gpu.md has the figures).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
