"""A run's progress in numbers, from which the lines of its metrics and its summary are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from adafrugal.memory import measure
from adafrugal.optim import Frugal
from adafrugal.optim.accounting import StateBytes, adamw_state_bytes

BESIDE = ("evaluation", "checkpoint", "compile")  # phases that tokens per second do not count


@dataclass
class Sums:
    """Sums over some steps."""

    loss: float = 0.0  # summed over targets, or examples
    count: int = 0  # of these
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    wall: float = 0.0  # seconds in all

    def mean(self) -> float:
        """The mean loss; NaN where nothing was counted."""
        return self.loss / self.count if self.count else math.nan


@dataclass
class Progress:
    """The progress of a run since its first start: plain numbers, saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    real_tokens: int = 0  # without padding
    refreshes: int = 0
    skips: int = 0  # steps skipped because the loss was not finite
    overflows: int = 0  # fp16 steps skipped because a gradient overflowed
    seconds: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    state_bytes_start: int = 0
    state_bytes_peak: int = 0
    memory_peak: int = 0
    window: Sums = field(default_factory=Sums)  # the steps since the last line of metrics
    unobserved: Sums = field(default_factory=Sums)  # the steps since a control last observed the training loss
    fitted_density: float | None = None  # at the start of the run, if `optimizer.fit_gib` chose it
    last_line: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] | None = None  # of a run that goes on from another's checkpoint: its run, step and code
    best: dict[str, Any] | None = None  # the line of the best evaluation so far, without those for a control

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Inverse of `state_dict`; reads those of older versions, too."""
        windows = {name: Sums(**state.get(name, {})) for name in ("window", "unobserved")}
        return cls(**{**state, **windows})

    def branched(self, origin: Mapping[str, Any]) -> Progress:
        """The progress of another run that begins here: steps and tokens are counted on, all measurements begin."""
        counted = ("step", "tokens", "real_tokens", "refreshes", "skips", "overflows", "unobserved", "fitted_density")
        return Progress(**{name: getattr(self, name) for name in counted}, origin=dict(origin))

    def add_step(self, tokens: int, real_tokens: int, count: int) -> None:
        """Count a step: its tokens, those without padding, and the count that its loss is averaged over."""
        self.step += 1
        self.tokens += tokens
        self.real_tokens += real_tokens
        for window in (self.window, self.unobserved):
            window.tokens += tokens
            window.count += count

    def add(self, loss: float, seconds: Mapping[str, float], wall: float) -> None:
        """Add sums since the last call: loss, seconds by phase, seconds in all."""
        self.window.loss += loss
        self.unobserved.loss += loss
        for sums in (self.window.seconds, self.seconds):
            sums |= {phase: sums.get(phase, 0.0) + more for phase, more in seconds.items()}
        for counter in (self, self.window):
            counter.wall += wall

    def observed(self) -> float:
        """The mean training loss of the steps since the last call; NaN if all were skipped."""
        loss = self.unobserved.mean()
        self.unobserved = Sums()
        return loss

    def close_window(
        self,
        optimizer: torch.optim.Optimizer,
        counted: StateBytes,
        lr: float,
        memory: Mapping[str, int],
        evaluated: Mapping[str, float],
    ) -> dict[str, Any]:
        """The line of metrics for the steps since the last one; the next window begins.

        `counted` is the state of all processes, `lr` the last step's, `memory` of `measure.read`; `evaluated` has the
        numbers of the evaluation after the last step, if there was one.
        """
        window = self.window
        self.state_bytes_peak = max(self.state_bytes_peak, counted.total)
        self.memory_peak = max(self.memory_peak, measure.peak(memory))
        is_frugal = isinstance(optimizer, Frugal)
        training = window.wall - sum(window.seconds.get(phase, 0.0) for phase in BESIDE)
        self.last_line = {
            "step": self.step,
            "loss": window.mean(),
            "lr": lr,
            "density": optimizer.density if is_frugal else None,
            "interval": optimizer.interval if is_frugal else None,
            "tokens": self.tokens,
            "real_tokens": self.real_tokens,
            "elapsed": self.wall,
            "tokens_per_second": window.tokens / training if training > 0 else 0.0,
            "seconds": window.seconds | {"wall": window.wall},
            "state_bytes": counted.total,
            "state_bytes_by_role": counted.by_role(),
            "memory": memory,
            **evaluated,
        }
        self.window = Sums()
        return self.last_line

    def summary(
        self,
        optimizer: torch.optim.Optimizer,
        counted: StateBytes,
        model: torch.nn.Module,
        conclusion: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The numbers of summary.json; `counted` is the state of all processes, `conclusion` the task's own numbers."""
        line = self.last_line
        parameters = [p for name, p in model.named_parameters() if ".lora_" not in name]  # without LoRA's adapters
        passes = self.seconds["forward"] + self.seconds["backward"]
        found: dict[str, Any] = {
            "steps": self.step,
            "tokens": self.tokens,
            "real_tokens": self.real_tokens,
            "padding": 1 - self.real_tokens / self.tokens,
            "loss": line["loss"],
            **{key: value for key, value in line.items() if key.startswith("validation_")},
            **conclusion,
            "seconds": self.seconds | {"wall": self.wall},
            "optimizer_share": (self.seconds["optimizer"] + self.seconds.get("refresh", 0.0)) / passes,
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "state_bytes": {
                "start": self.state_bytes_start,
                "peak": self.state_bytes_peak,
                "end": counted.total,
                "end_by_role": counted.by_role(),
                "adamw": adamw_state_bytes(parameters),
            },
            "memory": line["memory"] | {"peak_of_the_run": self.memory_peak},
            "density": line["density"],
            "interval": line["interval"],
            "refreshes": self.refreshes,
            "skips": self.skips,
            "overflows": self.overflows,
        }
        if self.origin is not None:
            found["continued_from"] = self.origin
        if isinstance(optimizer, Frugal):
            names = {n for g in optimizer.param_groups if g["split"] for n in g["param_names"]}
            moments = sum(counted[name].get("moments", 0) for name in names & counted.keys())
            found["skipped_steps"] = optimizer.skipped_steps
            found["split_moments"] = {"bytes": moments, "selected_entries": optimizer.selected_entries()}
        return found
