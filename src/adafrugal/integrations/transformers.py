"""Frugal in transformers.Trainer and in trainers built on it (TRL, LLaMA-Factory, axolotl)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adafrugal.integrations.watch import find_frugal, observes_every, report, steps_made, warn_if_rare
from adafrugal.optim import Frugal, Rule, split_parameters


def frugal_for(
    model: nn.Module, args: TrainingArguments | None = None, *, rules: Sequence[Rule] | None = None, **options: Any
) -> Frugal:
    """Return a Frugal over a model's parameters, for `Trainer(optimizers=(frugal_for(model, args), None))`.

    Args:
        model: the model that the trainer is given.
        args: its learning rate, betas, ε and weight decay are used, as Trainer does with an optimizer of its own;
            None: those of `options`, or Frugal's defaults.
        rules: as in `split_parameters`.
        options: any argument of `Frugal`; they come before those of `args`.
    """
    return Frugal(split_parameters(model, rules), **(_rates(args) | options))


def frugal_cls_and_kwargs(
    args: TrainingArguments | None = None, **options: Any
) -> tuple[Callable[..., Callable[..., Frugal]], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=…)` needs to call `frugal_for` itself, once it has the model.

    For trainers that make the model (`model_init`, a name given to TRL) or shard it. The arguments are those of
    `frugal_for`. It takes transformers 5.2 or newer: older ones give an optimizer groups, and no model.
    """

    def factory(*groups: Any, **_: Any) -> Callable[..., Frugal]:
        if groups:
            raise ValueError(
                "transformers 5.2 is needed; with an older one use optimizers=(frugal_for(model, args), None)"
            )
        return frugal_for

    return factory, _rates(args) | options


def _rates(args: TrainingArguments | None) -> dict[str, Any]:
    if args is None:
        return {}
    betas = (args.adam_beta1, args.adam_beta2)
    return {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}


class AdaFrugalCallback(TrainerCallback):
    """Let a loss-aware control observe evaluation losses, and log ρ, T and the bytes of optimizer state.

    At every multiple of the control's `every`, in optimizer steps, it asks the trainer for an evaluation and passes its
    loss on; other evaluations (`eval_steps`, `eval_on_start`) are not observed. It keeps no state of its own: steps, ρ
    and T are in the optimizer's state, which is in the trainer's checkpoints, so a resumed run continues bit for bit.

    Args:
        metric: the evaluation loss to observe; with several evaluation sets `"eval_<name>_loss"`.

    Raises:
        ValueError: as training begins or after an evaluation: the optimizer is no Frugal, or a loss is needed and
            nothing is evaluated or the metric is missing.
    """

    def __init__(self, metric: str = "eval_loss") -> None:
        self.metric = metric
        self._every: int | None = None
        self._before = 0  # steps made before the step in progress
        self._seen: list[str] | None = None  # metrics of the evaluation that is due; None if none is

    def attach(self, trainer: Trainer) -> None:
        """Put this callback before all others, so that trackers (`report_to`) log what it reports."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(other for other in callbacks if other is not self)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Find the Frugal, and see that the losses it needs will come."""
        self.optimizer = find_frugal(optimizer)
        self._every, self._seen = observes_every(self.optimizer), None
        if self._every is None:
            return
        if args.eval_strategy == "no":
            raise ValueError(
                "eval_strategy is 'no', and the interval depends on the evaluation loss: set eval_strategy='steps' and "
                "an eval_dataset, or a constant interval"
            )
        warn_if_rare(self._every, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note how many steps have been made."""
        self._refuse_missing()
        self._before = steps_made(self.optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for an evaluation if a loss is due; a step that was left out makes none due."""
        steps = steps_made(self.optimizer)
        if self._every and steps % self._every == 0 and steps > self._before:
            self._seen = []
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """Observe the loss that is due; ignore every other evaluation."""
        if self._seen is not None and self.metric in metrics:
            self._seen = None
            self.optimizer.observe(metrics[self.metric])
        elif self._seen is not None:
            self._seen += metrics

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """See that no loss is missing."""
        self._refuse_missing()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Add ρ, T and the bytes of state to what the trainer logs of its training."""
        if "loss" in logs:
            for line in (logs, state.log_history[-1]):
                line.update(report(self.optimizer))

    def _refuse_missing(self) -> None:
        if self._seen is not None:
            losses = ", ".join(name for name in self._seen if "loss" in name) or "no loss"
            raise ValueError(f"the evaluation has no {self.metric}; it has {losses}: AdaFrugalCallback(metric=…)")
