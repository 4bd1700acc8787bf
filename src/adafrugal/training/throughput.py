"""Model FLOP/s utilisation (MFU): the share of the GPU's peak that a run reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adafrugal.settings.schema import Settings
from adafrugal.tracking import cards
from adafrugal.training.devices import Place

IDLE_BELOW = 0.2  # of the peak
SMALL = 2**15  # tokens of a micro-batch


def peak_flops(place: Place) -> float | None:
    """The datasheet's FLOP/s of the GPU in the run's precision (TF32 for fp32: half); None where it is not known."""
    return cards.peak_flops(place.name(), place.precision) if place.is_gpu else None


def flops_per_token(model: torch.nn.Module) -> int:
    """FLOPs of forward and backward passes: six for each parameter but those of the input embedding.

    As in Kaplan et al., arXiv 2001.08361, attention's own products are left out.
    """
    embedding = model.get_input_embeddings().weight
    return 6 * (sum(p.numel() for p in model.parameters()) - embedding.numel())


class Meter:
    """Measures MFU of a pre-training run, whose processes share the work with a GPU each."""

    def __init__(self, settings: Settings, model: torch.nn.Module, place: Place, processes: int = 1) -> None:
        trainer = settings.trainer
        peak = peak_flops(place) if settings.task.kind == "pretrain" else None
        self._share_of_a_token = flops_per_token(model) / (peak * processes) if peak else None
        rows = min(trainer.micro_batch_size or trainer.batch_size, -(-trainer.batch_size // processes))
        self._micro_batch_tokens = rows * trainer.sequence_length
        self._lines = 0

    def mfu(self, tokens_per_second: float) -> dict[str, float]:
        """The share, for a line of metrics; empty where the peak is not known."""
        return {} if self._share_of_a_token is None else {"mfu": tokens_per_second * self._share_of_a_token}

    def idle(self, line: Mapping[str, Any]) -> str | None:
        """A warning, once, that a small batch leaves the GPU idle: at the second line, since steps warm up."""
        self._lines += 1
        mfu, tokens = line.get("mfu"), self._micro_batch_tokens
        if self._lines != 2 or mfu is None or mfu >= IDLE_BELOW or tokens >= SMALL:
            return None
        return (
            f"the GPU reaches {mfu:.0%} of its peak: {tokens:,} tokens in a micro-batch leave it idle between "
            "launches; a larger trainer.batch_size or trainer.sequence_length costs little time"
        )
