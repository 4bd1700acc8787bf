"""The training loop: steps, evaluations, the lines of the record, checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from adafrugal.config import Settings, TrainingError
from adafrugal.memory import measure
from adafrugal.optim import Frugal, Refresh, state_bytes
from adafrugal.tracking.record import Record
from adafrugal.tracking.wandb import WandbCopy
from adafrugal.training import checkpoint
from adafrugal.training.clock import PhaseClock
from adafrugal.training.devices import Place
from adafrugal.training.display import Display
from adafrugal.training.pretrain import Pretrain
from adafrugal.training.signals import Stop


@dataclass
class Window:
    """What the next line of metrics averages over: the steps since the last one."""

    nats: float = 0.0
    targets: int = 0
    tokens: int = 0


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    refreshes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, before the latest start
    wall: float = 0.0
    state_bytes_start: int = 0
    state_bytes_peak: int = 0
    memory_peak: int = 0
    window: Window = field(default_factory=Window)


class Loop:
    """Trains a task with an optimizer from where `progress` stands to the last step.

    Args:
        settings: of the run.
        task: model, batches, loss, evaluation.
        optimizer, scheduler: torch's, or this project's.
        place: device and precision.
        record, copy: what is written, and its copy at W&B if there is one.
        display: what a person sees.
    """

    def __init__(
        self,
        settings: Settings,
        task: Pretrain,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        place: Place,
        record: Record,
        copy: WandbCopy | None,
        display: Display,
    ) -> None:
        self.settings, self.task, self.optimizer, self.scheduler = settings, task, optimizer, scheduler
        self.place, self.record, self.copy, self.display = place, record, copy, display
        self.progress = Progress()
        self.clock = PhaseClock(place.device)
        self._read_before = self.clock.read()
        self._started = time.perf_counter()
        self._nats = torch.zeros((), dtype=torch.float64, device=place.device)  # of the window; read only at its end
        self._lr = 0.0
        self._observes = _observation_interval(optimizer)
        self.last_line: dict[str, Any] = {}
        if isinstance(optimizer, Frugal):
            optimizer.register_refresh_hook(self._refreshed)

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self, stop: Stop) -> bool:
        """Train to the last step; False when asked to stop before it. A checkpoint is left in both cases."""
        while self.progress.step < self.settings.trainer.steps:
            if stop.requested:
                self._save()
                return False
            self.advance()
        return True

    def advance(self) -> None:
        """One step, and what is due after it: evaluation, a line of the record, a checkpoint."""
        step, steps = self.progress.step + 1, self.settings.trainer.steps
        self._train_step(step)
        evaluated = self._evaluate(step) if self._evaluation_is_due(step) else {}
        if evaluated or step % self.settings.trainer.log_every == 0:
            self._log(evaluated)
        self.display.step(step)
        if step % self.settings.checkpoint.every == 0 or step == steps:
            self._save()

    def _train_step(self, step: int) -> None:
        """One optimizer step over a whole batch, whatever the number of micro-batches it comes in."""
        with self.clock("data"):
            batches = self.task.batch(step)
        targets = sum(batch.count() for batch in batches)
        for batch in batches:
            with self.clock("forward"):
                nats = self.task.nats(batch)
            with self.clock("backward"):
                (nats / targets).backward()
            self._nats += nats.detach()
        with self.clock("optimizer"):
            if self.settings.trainer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.settings.trainer.clip_norm)
            self._lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens.numel() for batch in batches)
        self.progress.step = step
        self.progress.tokens += tokens
        self.progress.window.tokens += tokens
        self.progress.window.targets += targets
        if step == 1:
            self.progress.state_bytes_start = state_bytes(self.optimizer).total

    def _refreshed(self, change: Refresh) -> None:
        self.clock.move(change.seconds, "optimizer", "refresh")
        self.progress.refreshes += change.event == "refresh"
        self.progress.state_bytes_peak = max(self.progress.state_bytes_peak, change.bytes_after)
        self.record.add_event(**asdict(change))

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _evaluation_is_due(self, step: int) -> bool:
        every = [self.settings.eval.every, *filter(None, [self._observes])]
        return step == self.settings.trainer.steps or any(step % n == 0 for n in every)

    def _evaluate(self, step: int) -> dict[str, float]:
        with self.clock("evaluation"):
            found = self.task.evaluate()
        if self._observes and step % self._observes == 0:
            before = self.optimizer.interval
            self.optimizer.observe(found["validation_loss"])
            if self.optimizer.interval != before:
                self.record.add_event("interval", step=step, before=before, after=self.optimizer.interval)
        return found

    # -- the record -----------------------------------------------------------------------------------------------

    def _log(self, evaluated: dict[str, float]) -> None:
        """Close the window: write its line and start the next."""
        window, now = self.progress.window, self.clock.read()
        seconds = {phase: now[phase] - self._read_before[phase] for phase in now}
        loss = (window.nats + self._nats.item()) / window.targets
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.progress.step}: lower optimizer.lr ({self.settings.optimizer.lr}) "
                "or set trainer.clip_norm"
            )
        training = sum(seconds[p] for p in ("data", "forward", "backward", "optimizer", "refresh"))
        counted = state_bytes(self.optimizer)
        self.progress.state_bytes_peak = max(self.progress.state_bytes_peak, counted.total)
        memory = measure.read(self.place.device)
        self.progress.memory_peak = max(self.progress.memory_peak, measure.peak(memory))
        is_frugal = isinstance(self.optimizer, Frugal)
        line = {
            "step": self.progress.step,
            "loss": loss,
            "lr": self._lr,
            "density": self.optimizer.density if is_frugal else None,
            "interval": self.optimizer.interval if is_frugal else None,
            "tokens": self.progress.tokens,
            "tokens_per_second": window.tokens / training if training else 0.0,
            "seconds": seconds,
            "state_bytes": counted.total,
            "state_bytes_by_role": counted.by_role(),
            "memory": memory,
            **evaluated,
        }
        self.record.add_metrics(line)
        if self.copy is not None:
            self.copy.add_metrics(line)
        self.display.metrics(line)
        self.last_line, self._read_before = line, now
        self.progress.window = Window()
        self._nats.zero_()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        with self.clock("checkpoint"):
            self._fold()
            state = {
                "progress": asdict(self.progress),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all(),
                "data": self.task.data["fingerprint"],
                "last_line": self.last_line,
            }
            saved = checkpoint.save(
                self.record.directory / "checkpoints",
                self.progress.step,
                self.task.model,
                state,
                self.settings.checkpoint.keep,
            )
        self.record.add_event("checkpoint", step=self.progress.step, name=saved.name)

    def _fold(self) -> None:
        """Move what is kept outside `progress` into it: the open window's loss, and the time so far."""
        self.progress.window.nats += self._nats.item()
        self._nats.zero_()
        self.progress.wall += time.perf_counter() - self._started
        self._started = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase over all starts of this run."""
        now = self.clock.read()
        return {phase: self.progress.seconds.get(phase, 0.0) + now[phase] for phase in now}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from what `_save` wrote; the model's weights are loaded already."""
        saved = state["progress"]
        self.progress = Progress(**saved | {"window": Window(**saved["window"])})
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.last_line = state["last_line"]


def _observation_interval(optimizer: torch.optim.Optimizer) -> int | None:
    """How many steps lie between two losses that the interval's control wants to see."""
    split = (group for group in optimizer.param_groups if group.get("split"))
    return next((getattr(group["interval"], "every", None) for group in split if isinstance(optimizer, Frugal)), None)
