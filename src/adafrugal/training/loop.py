"""The training loop: steps, evaluations, and when to write what."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from adafrugal.memory import measure
from adafrugal.optim import Frugal, Refresh, StateBytes, UpdateInBackward, state_bytes
from adafrugal.settings.schedule import factor
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError, TrainingError
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record
from adafrugal.training import compiling
from adafrugal.training.checkpoints import checkpoint, model_card, sharded
from adafrugal.training.checkpoints.writer import Writer, Written
from adafrugal.training.clock import PhaseClock
from adafrugal.training.compiling import Compilation
from adafrugal.training.display import Display
from adafrugal.training.distributed import parallel
from adafrugal.training.gradient_norm import GradientNorm
from adafrugal.training.progress import Progress
from adafrugal.training.tasks.task import StepBatch, Task
from adafrugal.training.throughput import Meter


class Loop:
    """Trains a task from where its progress stands to the last step; all processes go through the same steps.

    `known_as` are the settings that identify the run, saved in each checkpoint.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        optimizer: torch.optim.Optimizer,
        record: Record,
        display: Display,
        known_as: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        self.settings, self.task, self.optimizer, self.record, self.display = settings, task, optimizer, record, display
        self.place, self.ranks, self.known_as, self.progress = task.place, task.ranks, known_as, progress or Progress()
        place, ranks = self.place, self.ranks
        self.scheduler = LambdaLR(optimizer, factor(settings.schedule, settings.trainer.steps))
        self.clock = PhaseClock(place.device)
        self.compilation = Compilation(None)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=place.precision == "fp16")
        self._since, self._waited = time.perf_counter(), 0.0  # seconds: the last line's end, before `fit`
        self._meter = Meter(settings, task.model, place, ranks.size)
        self._first: StepBatch | None = None  # of this start
        self._losses: list[tuple[int, torch.Tensor]] = []  # by step, on the device; read only to record them
        self._lr = 0.0
        self._saved_step = 0
        self._is_sharded = ranks.size > 1 and settings.trainer.parallel == "fsdp"
        self._writer = Writer(record.directory / "checkpoints", settings.checkpoint.keep, ranks, self._is_sharded)
        self._card = model_card.ModelCard(settings, known_as, task)
        self._evaluated: dict[str, float] = {}  # at the last evaluation, with its step
        copies = settings.trainer.replicas if self._is_sharded else ranks.size
        self._gradient_norm = GradientNorm(task.model, ranks, copies)
        self._refreshed_at = 0
        self._observes, self._observed = _observation(optimizer)
        if isinstance(optimizer, Frugal):
            optimizer.register_refresh_hook(self._refreshed)
        if settings.trainer.update_in_backward:
            UpdateInBackward(optimizer, around=lambda: self.clock("optimizer"))

    def compile(self, warn: Callable[[str], None]) -> None:
        """Compile forward and backward passes where the settings or the device ask for it."""
        how = compiling.start(self.task, self.settings, self.display.say, warn)
        self.compilation = how
        if how.seconds:
            self.progress.add(0.0, {"compile": how.seconds}, how.seconds)

    def wait_for_data(self, stop: Stop) -> None:
        """Wait for the batch with which `fit` begins, unless a signal asks to stop."""
        begun = time.perf_counter()
        if self.progress.step < self.settings.trainer.steps:
            self._first = self._next_batch(stop)
        self._waited = time.perf_counter() - begun

    def fit(self, stop: Stop) -> bool:
        """Train to the last step; return False if stopped before it. Save a checkpoint in both cases."""
        self._since = time.perf_counter() - self._waited
        while self.progress.step < self.settings.trainer.steps:
            try:
                batch, self._first = self._first or self._next_batch(stop), None
            except SettingError:  # from the data, before the step begins
                self._save()
                raise
            if batch is None:
                break
            self.advance(batch)
        self._save()
        with self.clock("checkpoint"):
            self._note(self._writer.wait())
        return self.progress.step == self.settings.trainer.steps

    def advance(self, batch: StepBatch) -> None:
        """One step, and what is due after it: evaluation, a line of the record, a checkpoint."""
        self._train_step(batch)
        step, settings = self.progress.step, self.settings
        evaluated = self._evaluate() if self._is_evaluated(step) else {}
        if self._observes and step % self._observes == 0:
            self._observe(evaluated)
        if self._is_logged(step):
            self._log(evaluated)
        self.display.step(step)
        if self._is_best(evaluated) or step % settings.checkpoint.every == 0:
            self._save()
        self._note(self._writer.done())

    def _is_evaluated(self, step: int) -> bool:
        every = [self.settings.eval.every, *([self._observes] if self._observed == "validation" else [])]
        return step == self.settings.trainer.steps or any(step % n == 0 for n in every)

    def _is_logged(self, step: int) -> bool:
        return self._is_evaluated(step) or step % self.settings.trainer.log_every == 0

    def close(self) -> None:
        """Complete a checkpoint under way. After an error, report that error, not the checkpoint's."""
        with suppress(Exception):
            self._note(self._writer.wait())

    def _next_batch(self, stop: Stop) -> StepBatch | None:
        """The next step's batch; None when a signal has asked one of the processes to stop.

        Raises:
            SettingError: the data cannot give it; all processes leave together.
        """
        step = self.progress.step + 1
        self.ranks.arrive(f"step {step}")
        with self.clock("data"):
            while True:  # tokens that are not prepared yet may take long
                asked, batch, error = stop.requested, None, None
                try:
                    if not asked and self.task.is_ready(step, timeout=0.5):
                        batch = self.task.work(step)
                except SettingError as caught:
                    error = caught
                waits = batch is None and error is None
                one_waits, one_stops, one_fails = self.ranks.any([waits, asked, error is not None])
                if one_fails:
                    reasons = self.ranks.gather(error and str(error))
                    raise error or SettingError(next(reason for reason in reasons if reason))
                if one_stops:
                    return None
                if not one_waits:
                    return batch

    # -- training -------------------------------------------------------------------------------------------------

    def _train_step(self, work: StepBatch) -> None:
        """Make one optimizer step over a whole batch, however many micro-batches and processes share it."""
        step, skips = self.progress.step + 1, self.settings.trainer.on_nonfinite == "skip"
        share = max(1, work.count) / self.ranks.size  # gradients are averaged over processes
        summed = torch.zeros((), dtype=torch.float64, device=self.place.device)
        is_sound = True
        for number, batch in enumerate(work.batches, 1):
            with parallel.accumulating(self.task.module, is_last=number == len(work.batches)):
                with self.clock("forward"):
                    loss = self.task.loss(batch)
                summed += loss.detach()
                if skips and self.ranks.any([not math.isfinite(summed.item())])[0]:  # before the backward pass
                    is_sound = False
                    break
                with self.clock("backward"), self._refusals():
                    self.scaler.scale(loss / share).backward()
        # the last group is not split, so that its rate is not scaled; torchao keeps rates as tensors
        self._lr = float(self.optimizer.param_groups[-1]["lr"])
        if is_sound:
            if self._is_logged(step):
                self._gradient_norm.measure(self.scaler.get_scale())
            with self.clock("optimizer"):
                self._update()
            self._losses.append((step, summed))
        else:
            self._skip(step, *self.ranks.sum([summed.item()]))
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.add_step(work.tokens, work.real_tokens, work.count if is_sound else 0)
        if not self.progress.state_bytes_start:  # a first step that overflows leaves no state
            self.progress.state_bytes_start = self._state_bytes().total

    def _update(self) -> None:
        """Clip gradients, step optimizer and scheduler; in fp16 skip both steps if a gradient overflowed."""
        if self.settings.trainer.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.settings.trainer.clip_norm)
        scale = self.scaler.get_scale()
        with self._refusals():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self.progress.overflows += 1
        else:
            self.scheduler.step()

    def _skip(self, step: int, loss: float) -> None:
        """Skip a step: weights, optimizer and learning rate do not change."""
        limit = self.settings.trainer.max_skips
        self._note_nonfinite(step, loss)
        self.progress.skips += 1
        if self.progress.skips > limit:
            raise TrainingError(
                f"the loss is {loss} at step {step}, and {limit} steps were left out before (trainer.max_skips): "
                f"{self._remedy()}"
            )
        self.display.warn(f"the loss is {loss} at step {step}, which is left out ({self.progress.skips} of {limit})")

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn a ValueError of the optimizer's step into a TrainingError that names the step."""
        try:
            yield
        except ValueError as error:
            raise TrainingError(f"the optimizer cannot make step {self.progress.step + 1}: {error}") from error

    def _refreshed(self, change: Refresh) -> None:
        progress = self.progress
        self.clock.move(change.seconds, "optimizer", "refresh")
        if change.event == "refresh" and change.step != self._refreshed_at:  # several groups may refresh at one step
            progress.refreshes += 1
            self._refreshed_at = change.step
        if change.event != "shrink":  # a shrink needs no communication and only frees memory
            progress.state_bytes_peak = max(progress.state_bytes_peak, self._state_bytes().total)
            if self.ranks.size > 1:
                self.ranks.insist_alike(self.optimizer.checksum())
        # the optimizer does not count skipped steps; the record does
        self.record.add_event(**asdict(change) | {"step": progress.step + 1})

    def _note_nonfinite(self, step: int, loss: float) -> None:
        self.record.add_event("nonfinite", step=step, loss=loss, rows=self.task.rows(step))

    def _insist_on_a_number(self, name: str, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            self._note_nonfinite(step, loss)
            raise TrainingError(f"the {name} is {loss} at step {step}: {self._remedy()}")

    def _remedy(self) -> str:
        return f"lower optimizer.lr ({self.settings.optimizer.lr}) or set trainer.clip_norm"

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        self._fold()  # first: it raises an error that names the step of a loss that is not finite
        with self.clock("evaluation"):
            found = self.task.evaluate(last=self.progress.step == self.settings.trainer.steps)
        self._insist_on_a_number("validation loss", found["validation_loss"], self.progress.step)
        self._evaluated = {"step": self.progress.step, **found}
        return found

    def _is_best(self, evaluated: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far, so that its checkpoint is kept.

        Evaluations made only for a control are ignored here and in the summary.
        """
        step, settings = self.progress.step, self.settings
        is_last = step == settings.trainer.steps
        counts = step % settings.eval.every == 0 or is_last
        if not (settings.checkpoint.best and evaluated and counts and (self.task.last_is_alike or not is_last)):
            return False
        if self.progress.best is not None and not self.task.is_better(evaluated, self.progress.best):
            return False
        self.progress.best = {"step": step, **evaluated}
        return True

    def _observe(self, evaluated: dict[str, float]) -> None:
        """Give the controls the loss that they observe."""
        if self._observed == "training":
            self._fold()
            loss = self.progress.observed()
        else:
            loss = evaluated["validation_loss"]
        if math.isnan(loss):  # all these steps were skipped
            return
        before = self.optimizer.interval
        self.optimizer.observe(loss)
        if self.optimizer.interval != before:
            self.record.add_event("interval", step=self.progress.step, before=before, after=self.optimizer.interval)

    # -- what is written ------------------------------------------------------------------------------------------

    def _fold(self) -> None:
        """Add the losses on the device and the measured times to the progress."""
        losses = self.ranks.sum(torch.stack([loss for _, loss in self._losses]).tolist() if self._losses else [])
        for (step, _), loss in zip(self._losses, losses, strict=True):
            self._insist_on_a_number("loss", loss, step)
        self._losses.clear()
        now = time.perf_counter()
        self.progress.add(sum(losses), self.clock.take(), now - self._since)
        self._since = now

    def _log(self, evaluated: dict[str, float]) -> None:
        self._fold()
        memory = measure.read(self.place.device, self.compilation.replays)
        line = self.progress.close_window(self.optimizer, self._state_bytes(), self._lr, memory, evaluated)
        line |= self._gradient_norm.take() | self._meter.mfu(line["tokens_per_second"])
        if text := self._meter.idle(line):
            self.display.say(text)
        self.record.add_metrics(line)
        self.display.metrics(line, self.task.headline)

    def _save(self) -> None:
        """Save a checkpoint of this step, unless it is saved already."""
        if self._saved_step == self.progress.step:
            return
        begun = time.perf_counter()
        self._fold()
        self._saved_step = self.progress.step
        if not (self.ranks.first or self._is_sharded):
            return
        with self.clock("checkpoint"):
            state = {
                "account": self.progress.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": self.place.random_state(),
                "task": self.task.state_dict(),
                "precision": self.place.precision,
                "settings": self.known_as,
            }
            self.record.to_disk()  # after a power cut the record reaches as far as the checkpoint
            best = self.progress.best["step"] if self.progress.best else None
            files = {**self.task.files, model_card.NAME: self._model_card().encode()}
            self._note(self._writer.save(self.progress.step, self.task.model, files, state, best, begun))

    def _model_card(self) -> str:
        step = self.progress.step
        evaluated = self._evaluated if self._evaluated.get("step") == step else {}
        return self._card.text(checkpoint.name(step), self.progress, self._state_bytes().total, evaluated)

    def _note(self, written: Written | None) -> None:
        if written is not None:
            self.record.add_event("checkpoint", **asdict(written))

    def resume(self, state: dict[str, Any], directory: Path) -> None:
        """Continue from a checkpoint and the state of its state.pt; TrainingError if another version of us wrote it."""
        group = self.ranks.writing
        try:
            sharded.read_model(directory, self.task.model, group)
            self.progress = Progress.from_state(state["account"])
            self._saved_step = self.progress.step
            if not self.ranks.first:
                self.progress.memory_peak = 0  # the saved peak is rank 0's
            self.optimizer.load_state_dict(sharded.read_optimizer(state["optimizer"], directory, self.optimizer, group))
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.place.set_random_state(state["random"])
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.of_another_version(error) from error

    def _state_bytes(self) -> StateBytes:
        """The optimizer's state; sharded moments are summed over all processes."""
        counted = state_bytes(self.optimizer)
        if not self._is_sharded:
            return counted
        sums = self.ranks.sum([roles.get("moments", 0) for roles in counted.values()])
        for roles, total in zip(counted.values(), sums, strict=True):
            roles["moments"] = int(total) // self.settings.trainer.replicas
        return counted

    def summary(self) -> dict[str, Any]:
        """The end of the run in numbers, for summary.json; empty on all ranks but the first."""
        counted = self._state_bytes()
        mine = state_bytes(self.optimizer).total, self.progress.memory_peak
        own, peaks = zip(*self.ranks.gather(mine), strict=True)
        if not self.ranks.first:
            return {}
        every, last = self.settings.eval.every, self.settings.trainer.steps
        # ignore evaluations made only for a control: the best of more is better, and other arms have fewer
        scheduled = [line for line in self.record.metrics() if line["step"] % every == 0 or line["step"] == last]
        evaluations = [line for line in scheduled if "validation_loss" in line]
        found = self.progress.summary(self.optimizer, counted, self.task.model, self.task.conclude(evaluations))
        here = {"device": self.place.device.type, "precision": self.place.precision, "data": self.task.data}
        here |= self.compilation.decided(self.settings)
        if self.place.is_gpu:
            found["memory"]["peak_is"] = "reserved" if self.compilation.replays else "allocated"
        if self.ranks.size > 1:
            here["processes"] = {"parallel": self.settings.trainer.parallel, "state_bytes": own, "memory_peak": peaks}
        return found | {"epochs": self.task.epochs(self.progress.step)} | here


def _observation(optimizer: torch.optim.Optimizer) -> tuple[int | None, str | None]:
    """The number of steps between two losses that the controls observe, and the losses' source; both agree."""
    split = [group for group in optimizer.param_groups if group["split"]] if isinstance(optimizer, Frugal) else []
    for control in (group[name] for group in split for name in ("density", "interval")):
        if getattr(control, "every", None) is not None:
            return control.every, getattr(control, "source", "validation")
    return None, None
