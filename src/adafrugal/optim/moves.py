"""Updates whose moments lie in the CPU's memory, beside the GPU's other work, such as the rest of a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from adafrugal.optim import storage
from adafrugal.optim.options import Group
from adafrugal.optim.refresh import States
from adafrugal.optim.sharding.shards import local_grad


class Moves:
    """Streams of their own for the copies to a GPU and back, and for the updates between them."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def beside(self, group: Group, places: Sequence[int], states: States) -> Iterator[None]:
        """Let updates of tensors whose moments lie elsewhere wait for what the GPU has to do now, and no longer."""
        params = [group["params"][place] for place in places]
        grads = [local_grad(p) for p in params if p.is_cuda and storage.lie_elsewhere(p, states[p], group)]
        if not grads:
            yield
            return
        device = grads[0].device
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                yield
        except BaseException:
            self.end()
            raise
        for grad in grads:
            grad.record_stream(stream)  # its memory serves others only after the update

    def end(self) -> None:
        """Wait for the updates: the next step reads the weights, and the CPU the moments."""
        for stream in self._streams.values():
            stream.synchronize()
