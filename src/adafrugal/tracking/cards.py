"""What GPUs can do by their makers' datasheets. Needs no torch: runs and reports read it."""

from __future__ import annotations

import re

# dense TFLOP/s of the tensor cores in bf16 and fp16, from NVIDIA's datasheets of these cards; the first name that fits
_PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "A10G": 70, "A10": 125, "A30": 165,
    "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
_LESS = re.compile(r"\b(Laptop|Max-Q|Mobile|MIG)\b")  # of the name's card


def peak_flops(name: str) -> float | None:
    """FLOP/s of products in bf16 and fp16; None for a card that is not known.

    Args:
        name: as torch and nvidia-smi call it, such as "NVIDIA H100 80GB HBM3".
    """
    if _LESS.search(name):
        return None
    known = (peak for card, peak in _PEAKS.items() if re.search(rf"\b{card}\b", name))
    return next((peak * 1e12 for peak in known), None)
