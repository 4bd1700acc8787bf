"""What does whitening all split matrices cost, as a share of forward and backward passes? FLOPs, counted.

    python experiments/benchmarks/whitening.py

Newton–Schulz for a matrix a × b with a ≤ b is three products a step: XXᵀ and A·A, of 2a²b and 2a³ FLOPs, and one with
X, of 2a²b. Forward and backward passes count as `throughput.flops_per_token` does. Prints the table of
docs/optimizer.md.
"""

from __future__ import annotations

import bench
import torch

from adafrugal.models import llama
from adafrugal.optim import split_parameters
from adafrugal.optim.state_free import Whiten
from adafrugal.settings import compose
from adafrugal.training import throughput

SIZES = ("60m", "130m", "350m", "1b", "7b")
TOKENS = (512 * 256, 256)  # of a step


def flops(shape: torch.Size, steps: int = Whiten.steps) -> int:
    """Of whitening one matrix."""
    a, b = sorted(shape)
    return steps * (4 * a * a * b + 2 * a**3)


def share_of_one_token(size: str) -> float:
    """FLOPs of whitening every split matrix of a LLaMA ÷ those of forward and backward over one token."""
    with torch.device("meta"):
        model = llama.build(compose.settings([f"model=llama_{size}"]).model)
    split = [p for group in split_parameters(model) if group["split"] for _, p in group["params"]]
    return sum(flops(p.shape) for p in split) / throughput.flops_per_token(model)


def table() -> str:
    """Markdown."""
    many, few = TOKENS
    heads = f"model | {many:,} tokens a step | {few:,} tokens a step"
    rows = [(size.upper(), share_of_one_token(size)) for size in SIZES]
    return bench.markdown(heads, [(size, f"{one / many:.1%}", f"{one / few:.0f} times") for size, one in rows])


if __name__ == "__main__":
    print(table())
