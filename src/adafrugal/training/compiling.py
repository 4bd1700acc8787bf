"""torch.compile for a run: whether, in which mode, and when it happens.

What is compiled is a task's `forward`: autocast, the model and its loss in one region. All of it is compiled before the
first step, on batches of the shapes that the run will see, so that no step waits for it and a failure changes nothing.
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
from adafrugal.training.distributed.ranks import Ranks
from adafrugal.training.tasks.task import Task

_WITHOUT = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_GRAPHS = tuple(_WITHOUT)  # torch's modes that record CUDA graphs, above with the same mode without


@dataclass(frozen=True)
class Compilation:
    """How a run's forward and backward passes are made.

    Args:
        mode: of torch.compile; None where they are not compiled.
        seconds: that compiling took, rehearsals included.
        reason: why they are not compiled, or not in the mode that was asked for; None where there is nothing to say.
    """

    mode: str | None
    seconds: float = 0.0
    reason: str | None = None

    @property
    def replays(self) -> bool:
        """Whether steps are replays of CUDA graphs."""
        return self.mode in _GRAPHS

    def decided(self, settings: Settings) -> dict[str, Any]:
        """What was left to the device, as it came to be: for the record of a run with these settings."""
        found: dict[str, Any] = {"compile": self.mode, "micro_batch_size": settings.trainer.micro_batch_size}
        found |= {"compile_reason": self.reason} if self.reason else {}
        if hasattr(settings.model, "loss_chunk_rows"):
            found["loss_chunk_rows"] = settings.model.loss_chunk_rows
        return found


def start(
    task: Task,
    settings: Settings,
    place: Place,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    ranks: Ranks | None = None,
) -> Compilation:
    """Compile a task's forward and backward passes as `trainer.compile` says, or say why not.

    Args:
        task: whose `forward` is replaced; its model and optimizer are complete, and its weights are loaded.
        settings: of the run.
        place: device and precision.
        say: told that it takes long.
        warn: told, once, why something else than what was asked for is done.
        ranks: the processes of the run: all of them compile, or none.
    """
    trainer = settings.trainer
    if reason := _why_not(trainer, place):
        return Compilation(None, reason=reason)
    mode, reason = _mode(task, trainer, place)
    if reason and trainer.compile_mode != "auto":
        warn(reason)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(settings.cache_root).absolute() / "compiled"))
    say(f"compiling the model ({mode}): a minute or so at first, less from the cache")
    begun, eager = time.perf_counter(), task.forward
    failed = _try(task, place, eager, mode)
    if failed is not None and out_of_memory.is_memory(failed) and mode in _GRAPHS and trainer.compile_mode == "auto":
        reason = f"memory for CUDA graphs was refused ({first_line(failed)}): trainer.compile_mode is default"
        warn(reason)
        mode, failed = "default", _try(task, place, eager, "default")
    if failed is not None and out_of_memory.is_memory(failed):
        raise failed
    problems = [found for found in (ranks or Ranks()).gather(failed and first_line(failed)) if found]
    if problems:
        if failed is None:  # here, but not in another process
            _go_back(task, eager)
        reason = f"torch.compile does not work here ({problems[0]}); trainer.compile is false from here on"
        warn(reason)
        return Compilation(None, time.perf_counter() - begun, reason)
    if mode in _GRAPHS and (skipped := _skipped_graphs()):
        mode, reason = _WITHOUT[mode], f"torch recorded no CUDA graphs ({skipped} skipped)"
        warn(reason)
    return Compilation(mode, time.perf_counter() - begun, reason)


def forget() -> None:
    """Drop everything that was compiled in this process, and let go of its memory."""
    torch.compiler.reset()


def _try(task: Task, place: Place, eager: Callable[..., Any], mode: str) -> Exception | None:
    """Compile and rehearse; where that fails, undo it and return the error, of whatever kind torch.compile raises."""
    _inductor().pop("cudagraph_skips", None)
    task.forward = _compiled(eager, mode, dynamic=task.shapes_vary)
    try:
        _rehearse(task, place, passes=3 if mode in _GRAPHS else 1)  # graphs: warm up, record, replay
    except Exception as error:
        _go_back(task, eager)
        return error.with_traceback(None)  # whose frames hold tensors
    return None


def _go_back(task: Task, eager: Callable[..., Any]) -> None:
    task.forward = eager
    forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _skipped_graphs() -> int:
    return _inductor().get("cudagraph_skips", 0)


def _inductor() -> dict[str, int]:
    """What torch counts while it compiles."""
    from torch._dynamo.utils import counters  # a third of a second, for runs that compile alone

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


def _mode(task: Task, trainer: TrainerSettings, place: Place) -> tuple[str, str | None]:
    """The mode, and why it is not the one that was asked for, or not CUDA graphs."""
    asked = trainer.compile_mode
    if asked not in ("auto", *_GRAPHS):
        return asked, None
    without = _WITHOUT.get(asked, "default")
    if not place.is_gpu:
        return without, f"CUDA graphs need a GPU: trainer.compile_mode is {without}"
    # each replay writes to the same memory, in which the gradients of the micro-batch before it still lie
    several = task.micro_batches > 1
    for is_so, what in (
        (task.shapes_vary, "batches of one shape"),
        (several, "one micro-batch a step"),
        (trainer.parallel != "none", "one process"),
        (trainer.activation_checkpointing != "none", "trainer.activation_checkpointing=none"),
    ):
        if is_so:
            return without, f"CUDA graphs need {what}: trainer.compile_mode is {without}"
    return ("reduce-overhead" if asked == "auto" else asked), None


def _compiled(forward: Callable[..., Any], mode: str, dynamic: bool) -> Callable[..., Any]:
    compiled = torch.compile(forward, mode=mode, dynamic=dynamic)
    if mode not in _GRAPHS:
        return compiled

    def begin_and_run(*tensors: Tensor | None) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # what the last call gave may be overwritten from here on
        return compiled(*tensors)

    return begin_and_run


def _rehearse(task: Task, place: Place, passes: int) -> None:
    """Run forward and backward on each shape, in training and in evaluation, and leave no trace."""
    random = place.random_state()
    try:
        for batch in task.shapes():
            for _ in range(passes):
                with parallel.accumulating(task.module, is_last=False):  # no process waits for another
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
        place.set_random_state(random)
