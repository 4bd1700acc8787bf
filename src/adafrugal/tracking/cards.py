"""Peak speeds of GPUs, from datasheets. Imports no torch, since reports use it, too."""

from __future__ import annotations

import re

# dense TFLOP/s of the tensor cores in bf16 and fp16, from NVIDIA's datasheets; the first match counts
_PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "A10G": 70, "A10": 125, "A30": 165,
    "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
_SLOWER = re.compile(r"\b(Laptop|Max-Q|Mobile|MIG)\b")  # slower variants of these cards


def peak_flops(name: str) -> float | None:
    """Return the peak FLOP/s of matrix products in bf16 and fp16; None for an unknown card or a slower variant.

    Args:
        name: from torch or nvidia-smi, such as "NVIDIA H100 80GB HBM3".
    """
    known = (peak * 1e12 for card, peak in _PEAKS.items() if re.search(rf"\b{card}\b", name))
    return None if _SLOWER.search(name) else next(known, None)
