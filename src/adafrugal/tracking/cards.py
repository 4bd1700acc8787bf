"""Peak speeds of GPUs, from datasheets. Imports no torch, since reports use it, too."""

from __future__ import annotations

import re

# dense TFLOP/s of the tensor cores in bf16 and fp16, from NVIDIA's datasheets and AMD's; the first match counts
_PEAKS = {
    "B200": 2250, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "A10G": 70, "A10": 125,
    "A30": 165, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
}  # fmt: skip
# cards without bf16 and TF32, likewise: in fp16, and in fp32 without tensor cores; the V100 is that with SXM2
_OLDER = {"V100": (125, 15.7), "T4": (65, 8.1)}
_SLOWER = re.compile(r"\b(Laptop|Max-Q|Mobile|MIG)\b")  # slower variants of these cards


def peak_flops(name: str, precision: str = "bf16") -> float | None:
    """Return the peak FLOP/s of matrix products; None for an unknown card, a slower variant or a precision it lacks.

    Args:
        name: from torch or nvidia-smi, such as "NVIDIA H100 80GB HBM3".
        precision: bf16, fp16, fp32 (as TF32 where the card has it), or auto: bf16, and fp32 on a card without it.
    """
    if _SLOWER.search(name):
        return None
    known = [*((card, peak, peak / 2) for card, peak in _PEAKS.items()), *((c, *peaks) for c, peaks in _OLDER.items())]
    card, half, single = next((one for one in known if re.search(rf"\b{one[0]}\b", name)), ("", 0, 0))
    if not card or (card in _OLDER and precision == "bf16"):
        return None
    is_single = precision == "fp32" or (card in _OLDER and precision == "auto")
    return (single if is_single else half) * 1e12


def typed() -> dict[str, str]:
    """Return the known cards by the names that a person types, such as rtx-4090."""
    return {card.lower().replace(" ", "-"): card for card in (*_PEAKS, *_OLDER)}
