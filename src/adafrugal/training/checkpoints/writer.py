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

from adafrugal.training.checkpoints import checkpoint, sharded
from adafrugal.training.distributed.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Saved = PreTrainedModel | PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """A complete checkpoint.

    Args:
        step: of the run.
        name: of its directory.
        held: seconds that training waited: for the record, the checkpoint before, and the copy.
        seconds: that writing took, while training went on.
    """

    step: int
    name: str
    held: float
    seconds: float


class Writer:
    """Writes one checkpoint at a time, in a thread. Each process writes its shards; rank 0 writes the rest.

    The thread does not keep a process alive: a process stopped at once leaves an incomplete checkpoint, under a
    name that is never read.

    Args:
        root: where checkpoints are.
        keep: the number of newest checkpoints that stay.
        ranks: the processes of the run.
        is_sharded: whether each process holds a part of the tensors; else rank 0 holds all that is written.
    """

    def __init__(self, root: Path, keep: int, ranks: Ranks, is_sharded: bool) -> None:
        self._root, self._keep, self._ranks, self._is_sharded = root, keep, ranks, is_sharded
        self._staging = Staging()
        self._writing: Future[Written] | None = None

    def save(
        self,
        step: int,
        parts: Mapping[str, Saved],
        state: Mapping[str, Any],
        best: int | None = None,
        begun: float | None = None,
    ) -> Written | None:
        """Copy what a checkpoint needs, and begin to write the copy.

        Args:
            step: of the run.
            parts: `model`, and `tokenizer` where there is one.
            state: tensors, numbers and strings, nested.
            best: the step of a checkpoint that stays although there are newer ones.
            begun: `time.perf_counter()` when training began to wait for it; None: now.

        Returns:
            The checkpoint before, if neither `done` nor `wait` has returned it.

        Raises:
            TrainingError: the checkpoint before could not be written.
        """
        begun = begun or time.perf_counter()
        before = self.wait()
        fill, state = (self._copied_shards if self._is_sharded else self._copied)(step, parts, state)
        held = time.perf_counter() - begun
        self._writing = writing = Future()

        def write() -> None:
            started = time.perf_counter()
            try:
                if self._ranks.first:
                    checkpoint.save(self._root, step, fill, state, self._keep, best)
                else:
                    with checkpoint.writing(self._root, step):
                        fill()
                writing.set_result(Written(step, checkpoint.name(step), held, time.perf_counter() - started))
            except BaseException as error:  # raised by `wait`
                writing.set_exception(error)

        threading.Thread(target=write, name=f"checkpoint of step {step}", daemon=True).start()
        return before

    def _copied(
        self, step: int, parts: Mapping[str, Saved], state: Mapping[str, Any]
    ) -> tuple[Callable[[], Path], Mapping[str, Any]]:
        """A function that writes copies of the parts, and a copy of the state."""
        weights, state = self._staging.copy([parts["model"].state_dict(), state])

        def fill() -> Path:
            place = checkpoint.begin(self._root, step)
            for name, part in parts.items():
                part.save_pretrained(place, **({"state_dict": dict(weights)} if name == "model" else {}))
            return place

        return fill, state

    def _copied_shards(
        self, step: int, parts: Mapping[str, Saved], state: Mapping[str, Any]
    ) -> tuple[Callable[[], Path], Mapping[str, Any]]:
        """Begin to write the shards; return a function that waits for them, and the rest of the state."""
        tensors, rest = sharded.taken_apart(state)
        place, model = self._root / f".{checkpoint.name(step)}.new", parts["model"]
        with self._ranks.first_goes_first():  # rank 0 removes what a killed process left before any writes
            if self._ranks.first:
                checkpoint.begin(self._root, step)
        written = sharded.write(place, {**model.state_dict(), **tensors}, self._ranks.writing)

        def fill() -> Path:
            written.result()
            if self._ranks.first:
                model.config.save_pretrained(place)
            return place

        return fill, self._staging.copy(rest) if self._ranks.first else rest

    def done(self) -> Written | None:
        """The checkpoint completed since the last call, if there is one.

        Raises:
            TrainingError: it could not be written.
        """
        return self.wait() if self._writing is not None and self._writing.done() else None

    def wait(self) -> Written | None:
        """Wait for the checkpoint under way; None where there is none.

        Raises:
            TrainingError: it could not be written.
        """
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
        spare = {}
        for storage in self._spare:
            spare.setdefault(storage.nbytes(), []).append(storage)
        taken: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
        found = self._copied(value, spare, taken)
        self._spare = list(taken.values())
        return found

    def _copied(
        self,
        value: Any,
        spare: dict[int, list[torch.UntypedStorage]],
        taken: dict[tuple[torch.device, int], torch.UntypedStorage],
    ) -> Any:
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):  # torchao's, of several tensors
            return value.detach().to("cpu", copy=True)
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            key = (storage.device, storage.data_ptr())
            if key not in taken:
                size = storage.nbytes()
                taken[key] = spare[size].pop() if spare.get(size) else torch.UntypedStorage(size)
                taken[key].copy_(storage)
            copy = torch.empty(0, dtype=value.dtype)
            return copy.set_(taken[key], value.storage_offset(), value.size(), value.stride())
        if isinstance(value, Mapping):
            return type(value)((key, self._copied(part, spare, taken)) for key, part in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self._copied(part, spare, taken) for part in value)
        return value
