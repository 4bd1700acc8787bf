"""Write checkpoints in a thread; training waits only for the copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from adafrugal.training.checkpoints import checkpoint, sharded
from adafrugal.training.distributed.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Copied = tuple[Callable[[], None], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Written:
    """A complete checkpoint, as the record has it."""

    step: int
    name: str  # of its directory
    held: float  # seconds that training waited: for the record, the checkpoint before, and the copy
    seconds: float  # that writing took, while training went on


class Writer:
    """Writes one checkpoint at a time, in a thread. Each process writes its shards; rank 0 writes the rest.

    The thread does not keep a process alive: a process stopped at once leaves an incomplete checkpoint, under a name
    that is never read. The newest `keep` stay in `root`. Unless `is_sharded`, rank 0 holds all that is written.
    """

    def __init__(self, root: Path, keep: int, ranks: Ranks, is_sharded: bool) -> None:
        self._root, self._keep, self._ranks, self._is_sharded = root, keep, ranks, is_sharded
        self._staging = Staging()
        self._writing: Future[Written] | None = None

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        files: Mapping[str, bytes],
        state: Mapping[str, Any],
        best: int | None,
        begun: float,
    ) -> Written | None:
        """Copy what a checkpoint needs, and begin to write the copy; return the one before, or raise, as `wait` does.

        Args:
            step: of the run.
            model: written as transformers reads it.
            files: to write beside it, by name.
            state: tensors, numbers and strings, nested.
            best: the step of a checkpoint that stays although there are newer ones.
            begun: `time.perf_counter()` when training began to wait for it.
        """
        before, final = self.wait(), self._root / checkpoint.name(step)
        fill, rest = (self._copied_shards if self._is_sharded else self._copied)(final, model, state)
        held = time.perf_counter() - begun
        self._writing = writing = Future()

        def fill_all() -> None:
            fill()
            for name, content in files.items() if self._ranks.first else ():
                (checkpoint.scratch(final) / name).write_bytes(content)

        def write() -> None:
            started = time.perf_counter()
            try:
                checkpoint.save(final, fill_all, rest)
                if self._ranks.first:
                    checkpoint.prune(self._root, self._keep, best)
                writing.set_result(Written(step, final.name, held, time.perf_counter() - started))
            except BaseException as error:  # raised by `wait`
                writing.set_exception(error)

        threading.Thread(target=write, name=f"checkpoint of step {step}", daemon=True).start()
        return before

    def _copied(self, final: Path, model: PreTrainedModel, state: Mapping[str, Any]) -> Copied:
        """Copy all tensors; return a function that writes the model, and the state."""
        weights, state = self._staging.copy([model.state_dict(), state])

        def fill() -> None:
            model.save_pretrained(checkpoint.begin(final), state_dict=dict(weights))

        return fill, state

    def _copied_shards(self, final: Path, model: PreTrainedModel, state: Mapping[str, Any]) -> Copied:
        """Begin to write the shards; return a function that waits for them, and on rank 0 the rest of the state."""
        tensors, rest = sharded.taken_apart(state)
        place = checkpoint.scratch(final)
        with self._ranks.first_goes_first():  # rank 0 removes what a killed process left before any writes
            if self._ranks.first:
                checkpoint.begin(final)
        written = sharded.write(place, {**model.state_dict(), **tensors}, self._ranks.writing)

        def fill() -> None:
            written.result()
            if self._ranks.first:
                model.config.save_pretrained(place)

        return fill, self._staging.copy(rest) if self._ranks.first else None

    def done(self) -> Written | None:
        """The checkpoint completed since the last call, if there is one; raises as `wait` does."""
        return self.wait() if self._writing is not None and self._writing.done() else None

    def wait(self) -> Written | None:
        """Wait for the checkpoint under way, if there is one; TrainingError if it could not be written."""
        writing, self._writing = self._writing, None
        return writing.result() if writing is not None else None


class Staging:
    """Memory on the CPU that a run's tensors are copied into.

    It is kept from one checkpoint to the next, since allocating it takes longer than the copy.
    """

    def __init__(self) -> None:
        self._spare: list[torch.UntypedStorage] = []

    def copy(self, value: Any) -> Any:
        """The same nested dicts, lists and tuples, with copies of the tensors; overwrites those of the last call.

        Tensors that share memory share it in the copy, too, so that a file has it once.
        """
        spare: dict[int, list[torch.UntypedStorage]] = {}
        for storage in self._spare:
            spare.setdefault(storage.nbytes(), []).append(storage)
        taken: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if is_traceable_wrapper_subclass(tensor):  # torchao's, of several tensors
                return tensor.detach().to("cpu", copy=True)
            storage = tensor.untyped_storage()
            key = (storage.device, storage.data_ptr())
            if key not in taken:
                size = storage.nbytes()
                taken[key] = spare[size].pop() if spare.get(size) else torch.UntypedStorage(size)
                taken[key].copy_(storage)
            copy = torch.empty(0, dtype=tensor.dtype)
            return copy.set_(taken[key], tensor.storage_offset(), tensor.size(), tensor.stride())

        found = tree_map_only(torch.Tensor, copied, value)
        self._spare = list(taken.values())
        return found
