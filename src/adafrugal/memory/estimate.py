"""Estimate the memory of a run from its settings, before anything is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adafrugal.memory.built import build
from adafrugal.memory.trace import (
    Answers,
    Built,
    Footprint,
    Live,
    Passes,
    evaluation,
    footprint,
    repeated,
    shadows,
    traced,
)
from adafrugal.models import optimizers
from adafrugal.optim import Constant, Control, Displacement, Frugal, UpdateInBackward, state_bytes
from adafrugal.settings.schema import Settings, TrainerSettings
from adafrugal.system.errors import SettingError


@dataclass(frozen=True)
class Stage:
    """The run at one density ρ (None: the optimizer has none), with the subspace of the largest state."""

    density: float | None
    state: Mapping[tuple[str, str], int]  # bytes by kind of tensor (split, state-full) and role (moments, basis, …)
    training: Footprint  # the peak of a step with a refresh
    evaluation: Footprint  # the peak between two steps

    @property
    def peak(self) -> Footprint:
        """The larger of the two."""
        return max(self.training, self.evaluation, key=lambda peak: peak.total)


@dataclass(frozen=True)
class Estimate:
    """The memory of a run."""

    parameters: int  # entries of the model
    first_state: int  # bytes of optimizer state after the first step
    stages: tuple[Stage, ...]  # at the first density, and at the last one where that differs

    @property
    def peak(self) -> Footprint:
        """The largest of the stages' peaks."""
        return max((stage.peak for stage in self.stages), key=lambda peak: peak.total)


def estimate(settings: Settings) -> Estimate:
    """Trace steps, an evaluation, and the refreshes of a whole cycle of subspaces, on fake tensors.

    Where several processes have met (by torch.distributed, or `built.met`), it is of this one of them.

    Raises:
        SettingError: the optimizer refuses the model, its config.json cannot be read, or its shards cannot be told.
    """
    processes = shared(settings.trainer)
    try:
        with shadows(), _compiled(settings):
            return _traced(settings, processes)
    except SettingError:
        raise
    except ValueError as error:  # found only by a step: a subspace that selects nothing, for example
        raise SettingError(f"optimizer: {error}") from error


def shared(trainer: TrainerSettings) -> int:
    """Return the number of processes that share a run: those that have met.

    Raises:
        SettingError: the model is sharded, and they have not, or its shards lie in the CPU's memory.
    """
    if trainer.parallel == "none":
        return 1
    if dist.is_available() and dist.is_initialized():
        trainer.need(not trainer.offload, "offload", "false, since what lies in the CPU's memory is not told apart")
        return dist.get_world_size()
    many = "none, or with a number of processes: python -m adafrugal.memory … --processes N"
    trainer.need(trainer.parallel == "ddp", "parallel", many)
    return 1


def _traced(settings: Settings, processes: int) -> Estimate:
    built = build(settings, processes)
    settings, model = built.settings, built.model
    trainer = settings.trainer
    optimizer = optimizers.build(settings, optimizers.groups(settings, model))
    for group in optimizer.param_groups:
        if group.get("split") and "compile" in group:
            group["compile"] = False  # this process keeps compiled code for its real runs
        elif group.get("split") and "interval" in group:
            group["interval"] = 1  # a new basis at every step of a baseline, whose interval is a number
    if trainer.update_in_backward:
        UpdateInBackward(optimizer, around=Answers)
    passes = _passes(built)
    passes(Live(built, optimizer))  # not entered: nothing is counted
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    first_state, found, densities = state_bytes(optimizer).total, [], [None]
    if isinstance(optimizer, Frugal):
        control = next(group["density"] for group in optimizer.param_groups if group["split"])
        densities = list(dict.fromkeys(control.at(step) for step in (1, trainer.steps)))
    for density in densities:
        built.give_gradients()
        state = _largest_state(optimizer, density)
        optimizer.zero_grad(set_to_none=True)
        found.append((density, state, footprint(built, optimizer, passes, steps=2)))  # each with a refresh
    # last, since FSDP leaves gathered what is not in blocks
    evaluated = _once(built, "evaluation", lambda: evaluation(built))
    stages = (
        Stage(density, state, *(replace(peak, state=sum(state.values())) for peak in (training, evaluated)))
        for density, state, training in found
    )
    return Estimate(sum(parameter.numel() for parameter in model.parameters()), first_state, tuple(stages))


@contextmanager
def _compiled(settings: Settings) -> Iterator[None]:
    """Stand in for torchao's compiled update: of a tensor with moments in 8 bits it makes both in float32 at once."""
    if settings.optimizer.kind != "adamw_8bit":
        yield
        return
    from torchao.optim import adam

    def update(param: Tensor, grad: Tensor, step: Tensor, first: Tensor, second: Tensor, *_: Any) -> None:
        whole = [torch.empty_like(param, dtype=torch.float32) for m in (first, second) if hasattr(m, "codes")]
        del whole

    theirs, adam.single_param_adam = adam.single_param_adam, update
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        adam.single_param_adam = theirs


_KNOWN: dict[str, Footprint] = {}  # peaks of passes and evaluations, by what decides them


def _passes(built: Built) -> Passes:
    """Return the passes of a step; those of one model and batch are traced once for all optimizers."""
    passes = traced(built)
    if built.settings.trainer.update_in_backward:
        return passes
    return repeated(built, _once(built, "passes", lambda: footprint(built, None, passes, steps=1)))


def _once(built: Built, what: str, trace: Callable[[], Footprint]) -> Footprint:
    """Return a peak that does not depend on the optimizer, traced now if it was not before."""
    settings, trainer = built.settings, built.settings.trainer
    shape = built.rows, built.micro_batches > 1, trainer.sequence_length, trainer.precision
    how = trainer.activation_checkpointing, trainer.clip_norm, getattr(settings.data, "mask_documents", False)
    weights = [(tuple(p.shape), p.requires_grad) for p in built.model.parameters()]
    among = built.processes, trainer.parallel, trainer.replicas, trainer.device
    key = repr((what, settings.model, shape, how, weights, among))
    if key not in _KNOWN:
        _KNOWN[key] = trace()
    return _KNOWN[key]


def _always(interval: Control) -> Control:
    """Return an interval of 1 that keeps in the state what `interval` does."""
    return Displacement(min=1, max=1) if interval.keeps_gradients else Constant(1)


def _largest_state(optimizer: torch.optim.Optimizer, density: float | None) -> Mapping[tuple[str, str], int]:
    """Refresh through a cycle of subspaces at one density; return the largest state."""
    if density is None:
        return _state(optimizer)
    split = [group for group in optimizer.param_groups if group["split"] and group["density"] != Constant(0)]
    for group in split:
        group["density"], group["interval"], group["stagger"] = Constant(density), _always(group["interval"]), 1
    optimizer._rehearse()
    seen: set[tuple[int, ...]] = set()
    found = []
    while (turn := tuple(group["handed_out"] % len(group["params"]) for group in split)) not in seen:
        seen.add(turn)
        optimizer._rehearse()
        found.append(_state(optimizer))
    return max(found, key=Counter.total)


def _state(optimizer: torch.optim.Optimizer) -> Counter[tuple[str, str]]:
    """Count the state in the device's memory."""
    away = any(group.get("state_on") == "cpu_always_full" for group in optimizer.param_groups)
    split = {name for group in optimizer.param_groups if group.get("split") for name in group.get("param_names", ())}
    found: Counter[tuple[str, str]] = Counter()
    for name, roles in state_bytes(optimizer).items():
        for role, size in roles.items():
            whose = "split" if name in split else "state-full"
            if not (away and (whose, role) == ("state-full", "moments")):
                found[whose, role] += size
    return found
