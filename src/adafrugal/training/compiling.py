"""torch.compile for a run: whether, in which mode, and when it happens.

What is compiled is a task's `forward`: autocast, the model and its loss in one region. All of it is compiled before the
first step, on batches of the shapes that the run will see, so that no step waits for it and a failure changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adafrugal.config import Settings, TrainerSettings
from adafrugal.memory import refused
from adafrugal.training.devices import Place
from adafrugal.training.task import Task

_GRAPHS = ("reduce-overhead", "max-autotune")  # torch's modes that record CUDA graphs


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


def start(
    task: Task, settings: Settings, place: Place, say: Callable[[str], None], warn: Callable[[str], None]
) -> Compilation:
    """Compile a task's forward and backward passes as `trainer.compile` says, or say why not.

    Args:
        task: whose `forward` is replaced; its model and optimizer are complete, and its weights are loaded.
        settings: of the run.
        place: device and precision.
        say: told that it takes long.
        warn: told, once, why something else than what was asked for is done.
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
    task.forward = _compiled(eager, mode, dynamic=task.shapes_vary)
    try:
        _rehearse(task, place, passes=3 if mode in _GRAPHS else 1)  # graphs: warm up, record, replay
    except Exception as error:  # of whatever kind torch.compile raises: without it nothing is lost but speed
        if refused.is_memory(error):
            raise
        task.forward = eager
        torch.compiler.reset()
        reason = f"torch.compile does not work here ({_line(error)}); trainer.compile is false from here on"
        warn(reason)
        return Compilation(None, time.perf_counter() - begun, reason)
    return Compilation(mode, time.perf_counter() - begun, reason)


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
    without = "max-autotune-no-cudagraphs" if asked == "max-autotune" else "default"
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
    for batch in task.shapes():
        for _ in range(passes):
            task.loss(batch).backward()
            task.model.zero_grad(set_to_none=True)
        task.model.eval()
        with torch.no_grad():
            for _ in range(passes):
                task.loss(batch)
        task.model.train()
    place.set_random_state(random)


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
