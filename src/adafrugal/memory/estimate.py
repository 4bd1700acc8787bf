"""Memory from shapes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def adamw_state_bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    """What AdamW would keep if it trained all of these: two moments of each entry, and a four-byte counter each."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)
