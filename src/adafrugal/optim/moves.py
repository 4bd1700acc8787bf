"""Updates whose moments lie in the CPU's memory, beside the GPU's other work, such as the rest of a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from adafrugal.optim.options import Group
from adafrugal.optim.sharding.shards import local_grad


class Moves:
    """Streams of their own for the copies to a GPU and back, and for the updates between them."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def beside(self, group: Group, places: Sequence[int]) -> Iterator[None]:
        """Let updates of a group whose moments lie elsewhere wait for what the GPU has to do now, and no longer."""
        if group["split"] or group["state_on"] == "device":
            yield
            return
        grads = [local_grad(p) for p in (group["params"][place] for place in places) if p.is_cuda]
        try:
            with ExitStack() as stack:
                for device in {grad.device for grad in grads}:
                    stack.enter_context(torch.cuda.stream(self._following(device)))
                yield
        except BaseException:
            self.end()
            raise
        for grad in grads:
            grad.record_stream(self._streams[grad.device])  # its memory serves others only after the update

    def _following(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of a device, after what its present stream has to do."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    def end(self) -> None:
        """Wait for the updates: the next step reads the weights, and the CPU the moments."""
        for device, stream in self._streams.items():
            stream.synchronize()
            torch.cuda.current_stream(device).synchronize()  # on which they are if `state_on` has been changed by hand
