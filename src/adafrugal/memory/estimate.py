"""Memory from shapes, before anything is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from adafrugal.memory.on_device import with_chunks
from adafrugal.memory.trace import Answers, Footprint, footprint, shadows
from adafrugal.models import llama, optimizers
from adafrugal.models.loss import token_nats
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.optim import Constant, Frugal, UpdateInBackward, state_bytes
from adafrugal.settings.canonical import settled
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError


@dataclass(frozen=True)
class Stage:
    """The run at one density.

    Args:
        density: ρ; None where the optimizer has none.
        state: bytes by the tensors they are of (`split` or `state-full`) and what they are (`moments`, `indices`,
            `basis`, `counters`), of the turn that keeps most.
        peak: at that turn.
    """

    density: float | None
    state: Mapping[tuple[str, str], int]
    peak: Footprint

    @property
    def state_bytes(self) -> int:
        """All of the state."""
        return sum(self.state.values())


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Args:
        parameters: entries of the model.
        first_state: bytes of the state after the first step.
        stages: at the density it begins with, and at the one it ends with where that is another.
    """

    parameters: int
    first_state: int
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Footprint:
        """Of the whole run."""
        return max((stage.peak for stage in self.stages), key=lambda peak: peak.total)


def estimate(settings: Settings) -> Estimate:
    """Trace the first steps of a run, and the turns that its subspaces take, without allocating its tensors.

    Args:
        settings: of a pre-training run.

    Raises:
        SettingError: the run is no pre-training, or its optimizer refuses the model.
    """
    if settings.task.kind != "pretrain":
        raise SettingError(f"task is {settings.task.kind}; allowed: pretrain, since an encoder is read from its files")
    if settings.trainer.parallel == "fsdp":
        allowed = "none or ddp, since a process with a part of the model is not estimated"
        raise SettingError(f"trainer.parallel is fsdp; allowed: {allowed}")
    settings = with_chunks(settled(settings, None, settings.model.hidden_size))
    trainer = settings.trainer
    rows = trainer.micro_batch_size or trainer.batch_size
    half = torch.float16 if trainer.precision == "fp16" else torch.bfloat16
    with shadows(), _refusals():
        model = llama.build(settings.model)
        llama.attend_causally(model)
        groups = optimizers.groups(settings, model)
        optimizer = optimizers.build(settings, groups)
        for group in optimizer.param_groups:
            if group.get("split") and "compile" in group:
                group["compile"] = False  # what is compiled is kept for the process's real runs
        checkpoint_activations(model, trainer.activation_checkpointing)
        if trainer.update_in_backward:
            UpdateInBackward(optimizer, around=Answers)
        tokens = torch.zeros(rows, trainer.sequence_length, dtype=torch.int64)

        def loss() -> torch.Tensor:
            with torch.autocast("cpu", dtype=half, enabled=trainer.precision in ("bf16", "fp16")):
                return token_nats(model, tokens, tokens, settings.model.loss_chunk_rows)

        passes, clip = trainer.batch_size // rows, trainer.clip_norm
        _, first_state = footprint(model, optimizer, loss, passes, clip, steps=1)
        stages = []
        for density in _densities(optimizer, settings):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            largest = _largest(optimizer, density)
            optimizer.zero_grad(set_to_none=True)
            peak, _ = footprint(model, optimizer, loss, passes, clip, steps=2)  # with a refresh each
            stages.append(Stage(density, largest, replace(peak, state=sum(largest.values()))))
        parameters = sum(parameter.numel() for parameter in model.parameters())
    return Estimate(parameters, first_state, tuple(stages))


def _densities(optimizer: torch.optim.Optimizer, settings: Settings) -> list[float | None]:
    """ρ at the first step and at the last one."""
    if not isinstance(optimizer, Frugal):
        return [None]
    control = next(group["density"] for group in optimizer.param_groups if group["split"])
    return list(dict.fromkeys(control.at(step) for step in (1, settings.trainer.steps)))


@contextmanager
def _refusals() -> Iterator[None]:
    """What only a step finds out, as that a subspace selects nothing."""
    try:
        yield
    except ValueError as error:
        raise SettingError(f"optimizer: {error}") from error


def _largest(optimizer: torch.optim.Optimizer, density: float | None) -> dict[tuple[str, str], int]:
    """Let the subspace take all of its turns at one density, each at one step; the state of the one that keeps most."""
    found = [_state(optimizer)]
    if density is not None:
        split = [group for group in optimizer.param_groups if group["split"] and group["density"] != Constant(0)]
        for group in split:
            group["density"], group["interval"], group["stagger"] = Constant(density), Constant(1), 1
        optimizer.rehearse()
        seen: set[tuple[int, ...]] = set()
        found = []
        while (turn := tuple(group["handed_out"] % len(group["params"]) for group in split)) not in seen:
            seen.add(turn)
            optimizer.rehearse()
            found.append(_state(optimizer))
    return max(found, key=lambda state: sum(state.values()))


def _state(optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], int]:
    split = {name for group in optimizer.param_groups if group.get("split") for name in group.get("param_names", ())}
    found: Counter[tuple[str, str]] = Counter()
    for name, roles in state_bytes(optimizer).items():
        for role, size in roles.items():
            found["split" if name in split else "state-full", role] += size
    return dict(found)
