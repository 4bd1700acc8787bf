"""How much of what a GPU can do a run reaches."""

from __future__ import annotations

import torch

from adafrugal.training.devices import Place

# dense TFLOP/s of the tensor cores in bf16 and fp16, from NVIDIA's datasheets; the first name that fits counts
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
    "A100": 312, "A10G": 70, "A10": 125, "A30": 165, "L40S": 362, "L4": 121,
    "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
IDLE_BELOW = 0.2  # of the peak
SMALL = 2**15  # tokens of a micro-batch


def peak_flops(place: Place) -> float | None:
    """What the GPU's datasheet promises for products in the run's precision, in FLOP/s; None where it is not known.

    Products of float32 are made in TF32, at half the rate.
    """
    if not place.is_gpu:
        return None
    name = place.name()
    peak = next((peak for known, peak in PEAKS.items() if known in name), None)
    return None if peak is None else peak * 1e12 / (2 if place.precision == "fp32" else 1)


def flops_per_token(model: torch.nn.Module) -> int:
    """Of forward and backward: six for each parameter that a token is multiplied with.

    That is all but the input embedding, which is looked up (Kaplan et al., arXiv 2001.08361; attention's own products
    are left out, as there).
    """
    embedding = model.get_input_embeddings().weight
    return 6 * (sum(p.numel() for p in model.parameters()) - embedding.numel())


def idle(mfu: float, micro_batch_tokens: int) -> str | None:
    """The line for a run whose batch leaves the GPU idle; None where it does not, or where something else does."""
    if mfu >= IDLE_BELOW or micro_batch_tokens >= SMALL:
        return None
    return (
        f"the GPU reaches {mfu:.0%} of its peak: {micro_batch_tokens:,} tokens in a micro-batch leave it idle between "
        "launches; a larger trainer.batch_size or trainer.sequence_length costs little time"
    )
