"""Updates whose moments lie in the CPU's memory, beside the GPU's other work, such as the rest of a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from adafrugal.optim.options import Group
from adafrugal.optim.sharding.shards import local_grad


class Moves:
    """A stream of its own for the copies to a GPU and back, and for the updates between them."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def beside(self, group: Group, places: Sequence[int]) -> Iterator[None]:
        """Let updates of a group whose moments lie elsewhere wait for what the GPU has to do now, and no longer."""
        is_away = group["state_on"] != "device" and not group["split"]
        params = [group["params"][place] for place in places] if is_away else []
        grads = [local_grad(param) for param in params if param.is_cuda]
        if not grads:
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(grads[0].device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(grads[0].device))
        with torch.cuda.stream(self._stream):
            yield
        for grad in grads:
            grad.record_stream(self._stream)  # its memory serves others only after the update

    def end(self) -> None:
        """Wait for the updates: the next step reads the weights, and the CPU the moments."""
        if self._stream is not None:
            self._stream.synchronize()
