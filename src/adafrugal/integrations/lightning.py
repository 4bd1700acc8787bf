"""Frugal in Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from adafrugal.integrations.watch import find_frugal, observes_every, report, steps_made, warn_if_rare


class AdaFrugalCallback(Callback):
    """Let a loss-aware control observe validation losses, and log ρ, T and the bytes of optimizer state.

    Lightning decides when it validates, and counts batches for it; a validation is observed if at least the control's
    `every` optimizer steps were made since the last one observed. The sanity check is not. What is observed is the mean
    over processes. The step of the last observation is saved in Lightning's checkpoints; ρ and T are in the optimizer's
    state.

    Args:
        monitor: name under which the LightningModule logs the validation loss.

    Raises:
        ValueError: as training begins or after a validation: the optimizer is no Frugal, or the loss is missing.
    """

    def __init__(self, monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self._observed_at: int | None = None  # optimizer steps
        self._logged_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the training before; a checkpoint's state follows."""
        self._observed_at, self._logged_at = None, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that there is a Frugal and that the losses it needs will come."""
        optimizer = find_frugal(*trainer.optimizers)
        if self._observed_at is None:
            self._observed_at = steps_made(optimizer)
        every = observes_every(optimizer)
        if every is None:
            return
        if not trainer.enable_validation:
            raise ValueError(
                "the interval depends on the validation loss, and nothing is validated: set it to a number"
            )
        warn_if_rare(every, trainer.estimated_stepping_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the loss, if one is due."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        optimizer = find_frugal(*trainer.optimizers)
        every, steps = observes_every(optimizer), steps_made(optimizer)
        if every is None or steps - (self._observed_at or 0) < every:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(trainer.callback_metrics) or "nothing"
            raise ValueError(f"no {self.monitor} was logged; there is {logged}: AdaFrugalCallback(monitor=…)")
        self._observed_at = steps
        loss = trainer.strategy.reduce(trainer.callback_metrics[self.monitor], reduce_op="mean")
        optimizer.observe(float(loss))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log ρ, T and the bytes of state every `log_every_n_steps` optimizer steps."""
        step = trainer.global_step
        if step > self._logged_at and step % trainer.log_every_n_steps == 0:
            self._logged_at = step
            for logger in trainer.loggers:
                logger.log_metrics(report(find_frugal(*trainer.optimizers)), step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer step of the last observation."""
        return {"observed_at": self._observed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._observed_at = state_dict["observed_at"]
