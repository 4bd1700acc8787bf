"""How much of what a GPU can do a run reaches."""

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
    """What the GPU's datasheet promises for products in the run's precision, in FLOP/s; None where it is not known.

    Products of float32 are made in TF32, at half the rate.
    """
    if not place.is_gpu:
        return None
    peak = cards.peak_flops(place.name())
    return None if peak is None else peak / (2 if place.precision == "fp32" else 1)


def flops_per_token(model: torch.nn.Module) -> int:
    """Of forward and backward: six for each parameter that a token is multiplied with.

    That is all but the input embedding, which is looked up (Kaplan et al., arXiv 2001.08361; attention's own products
    are left out, as there).
    """
    embedding = model.get_input_embeddings().weight
    return 6 * (sum(p.numel() for p in model.parameters()) - embedding.numel())


class Meter:
    """What part of the GPUs' peak the steps of a pre-training run reach (MFU).

    Args:
        settings: of the run.
        model: that is trained.
        place: device and precision.
        processes: that share the work, with a GPU each.
    """

    def __init__(self, settings: Settings, model: torch.nn.Module, place: Place, processes: int = 1) -> None:
        trainer = settings.trainer
        peak = peak_flops(place) if settings.task.kind == "pretrain" else None
        self._share_of_a_token = flops_per_token(model) / (peak * processes) if peak else None
        rows = min(trainer.micro_batch_size or trainer.batch_size, -(-trainer.batch_size // processes))
        self._micro_batch_tokens = rows * trainer.sequence_length
        self._lines = 0

    def mfu(self, tokens_per_second: float) -> dict[str, float]:
        """The part, as what a line of metrics has of it; nothing where the peak is not known."""
        return {} if self._share_of_a_token is None else {"mfu": tokens_per_second * self._share_of_a_token}

    def idle(self, line: Mapping[str, Any]) -> str | None:
        """Say, once, that a small batch leaves the GPU idle: at the second line of metrics, since steps warm up."""
        self._lines += 1
        mfu, tokens = line.get("mfu"), self._micro_batch_tokens
        if self._lines != 2 or mfu is None or mfu >= IDLE_BELOW or tokens >= SMALL:
            return None
        return (
            f"the GPU reaches {mfu:.0%} of its peak: {tokens:,} tokens in a micro-batch leave it idle between "
            "launches; a larger trainer.batch_size or trainer.sequence_length costs little time"
        )
