"""torch.compile for a run: whether, in which mode, and when it happens.

A task's `forward` is compiled: autocast, the model and its loss in one region. That happens before the first step, on
batches of the shapes that the run will see, so that no step waits for it and a failure changes nothing.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adafrugal.memory import out_of_memory
from adafrugal.settings.schema import Settings, TrainerSettings
from adafrugal.system.errors import first_line
from adafrugal.training.devices import Place
from adafrugal.training.distributed import parallel
from adafrugal.training.tasks.task import Task

_WITHOUT = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_GRAPHS = tuple(_WITHOUT)  # torch's modes that record CUDA graphs, above with the same mode without


@dataclass(frozen=True)
class Compilation:
    """How a run's forward and backward passes are compiled."""

    mode: str | None  # of torch.compile; None: not at all
    seconds: float = 0.0  # that compiling took, rehearsals included
    reason: str | None = None  # why not, or why in another mode than the setting

    @property
    def replays(self) -> bool:
        """Whether steps are replays of CUDA graphs."""
        return self.mode in _GRAPHS

    def decided(self, settings: Settings) -> dict[str, Any]:
        """The choices made for the device, for the record of a run with these settings."""
        found: dict[str, Any] = {"compile": self.mode, "micro_batch_size": settings.trainer.micro_batch_size}
        found |= {"compile_reason": self.reason} if self.reason else {}
        if hasattr(settings.model, "loss_chunk_rows"):
            found["loss_chunk_rows"] = settings.model.loss_chunk_rows
        return found


def start(task: Task, settings: Settings, say: Callable[[str], None], warn: Callable[[str], None]) -> Compilation:
    """Compile a task's forward and backward passes as `trainer.compile` says, or say why not.

    Its `forward` is replaced; its model and optimizer are complete, its weights loaded. All processes compile, or none.
    `say` prints that compiling takes long, `warn` once why another mode than the setting's is used, or none.
    """
    trainer = settings.trainer
    if reason := _why_not(trainer, task.place):
        return Compilation(None, reason=reason)
    mode, reason = _mode(task, trainer)
    if reason and trainer.compile_mode != "auto":
        warn(reason)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(settings.cache_root).absolute() / "compiled"))
    say(f"compiling the model ({mode}): a minute or so at first, less from the cache")
    begun, eager = time.perf_counter(), task.forward
    failed = _try(task, eager, mode)
    if failed is not None and out_of_memory.is_memory(failed) and mode in _GRAPHS and trainer.compile_mode == "auto":
        reason = f"memory for CUDA graphs was refused ({first_line(failed)}): trainer.compile_mode is default"
        warn(reason)
        mode, failed = "default", _try(task, eager, "default")
    if failed is not None and out_of_memory.is_memory(failed):
        raise failed
    problems = [found for found in task.ranks.gather(failed and first_line(failed)) if found]
    if problems:
        if failed is None:  # it failed in another process only
            _go_back(task, eager)
        reason = f"torch.compile does not work here ({problems[0]}); trainer.compile is false from here on"
        warn(reason)
        return Compilation(None, time.perf_counter() - begun, reason)
    if mode in _GRAPHS and (skipped := _counted().get("cudagraph_skips", 0)):
        mode, reason = _WITHOUT[mode], f"torch recorded no CUDA graphs ({skipped} skipped)"
        warn(reason)
    return Compilation(mode, time.perf_counter() - begun, reason)


def _try(task: Task, eager: Callable[..., Any], mode: str) -> Exception | None:
    """Compile and rehearse; if that fails, undo it and return the error, of any class."""
    _counted().pop("cudagraph_skips", None)
    task.forward = compiled = torch.compile(eager, mode=mode, dynamic=task.shapes_vary)

    def begin_and_run(*tensors: Tensor | None) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the output of the last call may be overwritten from here on
        return compiled(*tensors)

    if mode in _GRAPHS:
        task.forward = begin_and_run
    try:
        _rehearse(task, passes=3 if mode in _GRAPHS else 1)  # graphs: warm up, record, replay
    except Exception as error:
        _go_back(task, eager)
        return error.with_traceback(None)  # whose frames hold tensors
    return None


def _go_back(task: Task, eager: Callable[..., Any]) -> None:
    task.forward = eager
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _counted() -> dict[str, int]:
    """Counters of a compilation, by torch."""
    from torch._dynamo.utils import counters  # takes a third of a second; only runs that compile need it

    return counters["inductor"]


def _why_not(trainer: TrainerSettings, place: Place) -> str | None:
    if trainer.compile is True:
        return None
    if trainer.compile is False:
        return "trainer.compile is false"
    if not place.is_gpu:
        return "the device is a CPU"
    if trainer.update_in_backward:
        return "trainer.update_in_backward needs gradients one by one, and compiled code gives all at once"
    return None


def _mode(task: Task, trainer: TrainerSettings) -> tuple[str, str | None]:
    """The mode, and the reason if it differs from the setting or has no CUDA graphs."""
    asked = trainer.compile_mode
    if asked not in ("auto", *_GRAPHS):
        return asked, None
    without = _WITHOUT.get(asked, "default")
    for is_so, what in (
        (not task.place.is_gpu, "a GPU"),
        (task.shapes_vary, "batches of one shape"),
        (trainer.parallel != "none", "one process"),
        # each replay overwrites the memory that holds the gradients of the micro-batch before
        ((trainer.micro_batch_size or trainer.batch_size) < trainer.batch_size, "one micro-batch a step"),
        (trainer.activation_checkpointing != "none", "trainer.activation_checkpointing=none"),
    ):
        if is_so:
            return without, f"CUDA graphs need {what}: trainer.compile_mode is {without}"
    return ("reduce-overhead" if asked == "auto" else asked), None


def _rehearse(task: Task, passes: int) -> None:
    """Run forward and backward on each shape, in training and in evaluation; then reset all state."""
    random = task.place.random_state()
    try:
        for batch in task.shapes():
            for _ in range(passes):
                with parallel.accumulating(task.module, is_last=False):  # without communication
                    task.loss(batch).backward()
                task.model.zero_grad(set_to_none=True)
            task.model.eval()
            with torch.no_grad():
                for _ in range(passes):
                    task.loss(batch)
            task.model.train()
    finally:
        task.model.train()
        task.model.zero_grad(set_to_none=True)
        task.place.set_random_state(random)
