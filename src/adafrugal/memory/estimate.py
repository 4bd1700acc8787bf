"""Estimate the memory of a run from its settings, before anything is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from adafrugal.memory.on_device import with_chunks
from adafrugal.memory.trace import Answers, Footprint, Live, Passes, footprint, repeated, shadows, traced
from adafrugal.models import llama, optimizers
from adafrugal.models.loss import TokenNats
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.optim import Constant, Control, Displacement, Frugal, UpdateInBackward, state_bytes
from adafrugal.settings.canonical import settled
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError


@dataclass(frozen=True)
class Stage:
    """The run at one density ρ (None: the optimizer has none), with the subspace of the largest state."""

    density: float | None
    state: Mapping[tuple[str, str], int]  # bytes by kind of tensor (split, state-full) and role (moments, basis, …)
    peak: Footprint  # of a step with a refresh


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
    """Trace steps of a pre-training run, and the refreshes of a whole cycle of subspaces, on fake tensors.

    Raises:
        SettingError: the task is not pre-training, or the optimizer refuses the model.
    """
    if settings.task.kind != "pretrain":
        raise SettingError(f"task is {settings.task.kind}; allowed: pretrain, since an encoder is read from its files")
    if settings.model.kind != "llama":
        raise SettingError(f"model is of kind {settings.model.kind}; allowed: llama, since others are not estimated")
    if settings.trainer.parallel == "fsdp":
        raise SettingError("trainer.parallel is fsdp; allowed: none or ddp, since shards of a model are not estimated")
    settings = with_chunks(settled(settings, None, settings.model.hidden_size))
    try:
        with shadows():
            return _traced(settings)
    except SettingError:
        raise
    except ValueError as error:  # found only by a step: a subspace that selects nothing, for example
        raise SettingError(f"optimizer: {error}") from error


def _traced(settings: Settings) -> Estimate:
    trainer = settings.trainer
    model = llama.build(settings.model)
    llama.attend_causally(model)
    optimizer = optimizers.build(settings, optimizers.groups(settings, model))
    for group in optimizer.param_groups:
        if group.get("split") and "compile" in group:
            group["compile"] = False  # this process keeps compiled code for its real runs
        elif group.get("split") and "interval" in group:
            group["interval"] = 1  # a new basis at every step of a baseline, whose interval is a number
    checkpoint_activations(model, trainer.activation_checkpointing)
    if trainer.update_in_backward:
        UpdateInBackward(optimizer, around=Answers)
    passes = _passes(settings, model)
    passes(Live(model, optimizer))  # not entered: nothing is counted
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    first_state, stages, densities = state_bytes(optimizer).total, [], [None]
    if isinstance(optimizer, Frugal):
        control = next(group["density"] for group in optimizer.param_groups if group["split"])
        densities = list(dict.fromkeys(control.at(step) for step in (1, trainer.steps)))
    for density in densities:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state = _largest_state(optimizer, density)
        optimizer.zero_grad(set_to_none=True)
        peak = footprint(model, optimizer, passes, steps=2)  # each with a refresh
        stages.append(Stage(density, state, replace(peak, state=sum(state.values()))))
    return Estimate(sum(parameter.numel() for parameter in model.parameters()), first_state, tuple(stages))


_KNOWN: dict[str, Footprint] = {}  # peaks of forward and backward passes, by what decides them


def _passes(settings: Settings, model: torch.nn.Module) -> Passes:
    """Return the passes of a step; those of one model and batch are traced once for all optimizers."""
    trainer = settings.trainer
    rows = trainer.micro_batch_size or trainer.batch_size
    half = torch.float16 if trainer.precision == "fp16" else torch.bfloat16
    tokens = torch.zeros(rows, trainer.sequence_length, dtype=torch.int64)
    nats = TokenNats(model, settings.model.loss_chunk_rows)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=half, enabled=trainer.precision in ("bf16", "fp16")):
            return nats(tokens, tokens)

    passes = traced(model, loss, trainer)
    if trainer.update_in_backward:
        return passes
    shape = rows, rows == trainer.batch_size, trainer.sequence_length, trainer.precision
    how = trainer.activation_checkpointing, trainer.clip_norm, [p.requires_grad for p in model.parameters()]
    key = repr((settings.model, shape, how))
    if key not in _KNOWN:
        _KNOWN[key] = footprint(model, None, passes, steps=1)
    return repeated(model, _KNOWN[key])


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
    split = {name for group in optimizer.param_groups if group.get("split") for name in group.get("param_names", ())}
    found: Counter[tuple[str, str]] = Counter()
    for name, roles in state_bytes(optimizer).items():
        for role, size in roles.items():
            found["split" if name in split else "state-full", role] += size
    return found
