"""The caller's modes of torch, which are no part of a step.

Draws and temporaries name their device and dtype, so that a default device or dtype does not matter. This leaves the
modes that act on operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")  # device types


@contextmanager
def apart() -> Iterator[None]:
    """Leave autograd, autocast and inference mode: products keep their dtype, and state may change in any mode later.

    Also a decorator.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device_type in _AUTOCAST:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.no_grad())
        yield
