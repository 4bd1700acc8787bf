"""What a job will cost, before it is run: tokens, FLOPs, memory, disk, hours, or why that is not known.

Of the data only labelled sets are read, where they are on disk.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from adafrugal.models import flops
from adafrugal.optim import choices
from adafrugal.settings import checkpoint_names
from adafrugal.settings.canonical import with_run_length
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError
from adafrugal.tracking import cards

if TYPE_CHECKING:
    from adafrugal.memory.estimate import Estimate
    from adafrugal.training.few_steps import Measured

TOKENS_OF_A_DOCUMENT = 400  # C4's, about (docs/data.md)
NO_SIZE = "needs the data set's size, and it is not on disk"
NO_CONFIG = "need the model's config.json, and it is not on disk"
OTHER_SHAPE = "FLOPs are counted of LLaMAs alone"
NOT_COUNTED = "a batch is as long as its longest example: what that computes is not known before"


@dataclass(frozen=True)
class Costs:
    """The figures of one job; None where there is none, with the reason in `unknown`."""

    steps: int | None
    tokens: int | None  # padding included
    is_bound: bool  # whether the tokens are an upper bound
    flops: float | None  # of the model: what recompute repeats is not counted
    estimate: Estimate | None
    checkpoints: int | None  # bytes of those that stay
    stored: int | None  # bytes of tokens on disk, about, if the text is so long; by TOKENS_OF_A_DOCUMENT
    documents: int | None  # which are stored whole where a row is one document; None: rows are packed
    seconds: float | None
    unknown: tuple[str, ...]  # reasons


@dataclass(frozen=True)
class OnCard:
    """The hours of a job on a card that reaches a share of its peak."""

    card: str  # as typed
    share: float

    def seconds(self, settings: Settings) -> float | None:
        """Return the seconds of passes and evaluations, recomputed products included; None: it lacks the precision."""
        peak = cards.peak_flops(cards.typed()[self.card], settings.trainer.precision)
        steps, trainer = settings.trainer.steps, settings.trainer
        again = steps * trainer.batch_size * trainer.sequence_length * flops.recomputed(settings)
        return None if peak is None else (model_flops(settings) + again) / (peak * self.share)


class Counter:
    """Counts the costs of jobs; what jobs have in common is worked out once.

    Args:
        on: the card that the hours are of; None: no hours, or measured ones.
        measure: whether to measure hours on this machine.
    """

    def __init__(self, on: OnCard | None, measure: bool) -> None:
        self._on, self._measure = on, measure
        self._estimates: dict[str, Estimate | SettingError] = {}
        self.measured: dict[str, Measured | str] = {}  # by what decides the time of a step, or why there is none
        self._examples: dict[str, int | None] = {}

    def costs(self, settings: Settings) -> Costs:
        """Return the costs of one job."""
        if settings.task.kind != "pretrain":
            return self._of_finetuning(settings)
        trainer, unknown = settings.trainer, []
        steps = trainer.steps - begins(settings)
        tokens = steps * trainer.batch_size * trainer.sequence_length
        found = self._estimate(settings)
        if isinstance(found, SettingError):
            unknown.append(f"memory and checkpoints: {found}")
        estimate = None if isinstance(found, SettingError) else found
        is_counted = settings.model.kind == "llama"
        seconds, why = self._seconds(settings) if is_counted else (None, OTHER_SHAPE)
        if why:
            unknown.append(f"hours: {why}")
        documents = None if settings.data.rows == "packed" else steps * trainer.batch_size
        stored = _stored(settings, tokens if documents is None else documents * TOKENS_OF_A_DOCUMENT)
        return Costs(
            steps, tokens, False, model_flops(settings) if is_counted else None, estimate,
            _checkpoints(settings, estimate, trainer.steps), stored, documents, seconds, tuple(unknown),
        )  # fmt: skip

    def _of_finetuning(self, settings: Settings) -> Costs:
        trainer, steps, unknown = settings.trainer, settings.trainer.steps, [f"FLOPs and hours: {NOT_COUNTED}"]
        found = self._estimate(settings)
        if isinstance(found, SettingError):
            unknown.append(f"memory and checkpoints: {found}")
        estimate = None if isinstance(found, SettingError) else found
        if steps is None:
            examples = self._training_examples(settings)
            if examples is None:
                unknown.append(f"steps and tokens: {NO_SIZE}")
            else:
                steps = max(1, round(trainer.epochs * -(-examples // trainer.batch_size)))
        tokens = None if steps is None else steps * trainer.batch_size * trainer.sequence_length
        checkpoints = None if steps is None else _checkpoints(settings, estimate, steps)
        return Costs(steps, tokens, True, None, estimate, checkpoints, None, None, None, tuple(unknown))

    def _training_examples(self, settings: Settings) -> int | None:
        data, key = settings.data, repr(settings.data)
        if data.examples is None and key not in self._examples:
            from adafrugal.data.labelled import training_examples

            self._examples[key] = training_examples(data) if Path(str(data.source)).is_dir() else None
        return data.examples or self._examples[key]

    def _estimate(self, settings: Settings) -> Estimate | SettingError:
        """Return the estimate of `python -m adafrugal.memory`, or why there is none."""
        key = _memory_key(settings)
        if key not in self._estimates:
            self._estimates[key] = _estimated(settings)
        return self._estimates[key]

    def _seconds(self, settings: Settings) -> tuple[float | None, str]:
        """Return the seconds of a pre-training run, or why they are not known."""
        if self._on is not None:
            found = self._on.seconds(settings)
            return found, "" if found else f"{self._on.card} has no {settings.trainer.precision}"
        if not self._measure:
            return None, ""
        found = self.measured.setdefault(key := _time_key(settings), "")
        if found == "":
            from adafrugal.training import few_steps

            self.measured[key] = found = few_steps.measure(settings)
        if isinstance(found, str):
            return None, found
        steps = settings.trainer.steps - begins(settings)
        return found.seconds(steps, _refreshes(settings), evaluated_tokens(settings)), ""


def _estimated(settings: Settings) -> Estimate | SettingError:
    """Return the estimate; of a model that is read nothing is fetched from the hub."""
    from huggingface_hub import constants, try_to_load_from_cache

    from adafrugal.memory import estimate, fit

    name = getattr(settings.model, "name", None)
    if name and not Path(name).is_dir():
        found = try_to_load_from_cache(name, "config.json", revision=settings.model.revision)
        if not isinstance(found, str):
            return SettingError(NO_CONFIG)
    try:
        with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
            return estimate.estimate(fit.within_budget(settings))
    except SettingError as error:
        return error


def begins(settings: Settings) -> int:
    """Return the steps that are behind a run when it begins: those of the run that it continues."""
    source = settings.trainer.continue_from
    return checkpoint_names.step(source) if source else 0


def model_flops(settings: Settings) -> int:
    """Return the model FLOPs of a pre-training run: forward and backward passes, and evaluations forward only."""
    trainer = settings.trainer
    tokens = (trainer.steps - begins(settings)) * trainer.batch_size * trainer.sequence_length
    forward = flops.forward(settings.model, trainer.sequence_length).all
    return tokens * flops.trained(settings) + evaluated_tokens(settings) * forward


def evaluated_tokens(settings: Settings) -> int:
    """Return the tokens of all evaluations of a pre-training run; padding of short documents is not counted."""
    read, steps = settings.eval, settings.trainer.steps
    pace = read.every, *_observed(settings)
    due = {step for every in pace for step in range(every, steps, every) if step > begins(settings)}
    return len(due) * read.tokens + (read.last_tokens or read.tokens)


def _observed(settings: Settings) -> tuple[int, ...]:
    """Return the steps between two evaluations for a control of FRUGAL's family, if it looks at the validation loss."""
    found = []
    for name in ("density", "rank", "interval"):
        if (given := getattr(settings.optimizer, name, None)) is not None and settings.optimizer.kind == "frugal":
            control = with_run_length(given, settings.trainer.steps)
            if control.get("every") and control.get("source", "validation") == "validation":
                found.append(control["every"])
    return tuple(found)


def _refreshes(settings: Settings) -> int:
    """Return the refreshes of the run if T stays what it is at first; it can only grow."""
    from adafrugal.optim import controls

    given = getattr(settings.optimizer, "interval", None)
    if given is None:
        return 0
    first = controls.interval(with_run_length(given, settings.trainer.steps)).at(1)
    return -(-(settings.trainer.steps - begins(settings)) // max(1, int(first)))


def _checkpoints(settings: Settings, estimate: Estimate | None, steps: int) -> int | None:
    """Return the bytes of the checkpoints that stay: weights and the largest state, of the newest and the best."""
    if estimate is None:
        return None
    weights = estimate.parameters * (2 if getattr(settings.model, "dtype", "float32") == "bfloat16" else 4)
    state = max(stage.peak.state for stage in estimate.stages)
    made = -(-steps // settings.checkpoint.every) - begins(settings) // settings.checkpoint.every
    return (weights + state) * (min(settings.checkpoint.keep, made) + settings.checkpoint.best)


def _stored(settings: Settings, tokens: int) -> int:
    """Return the bytes of tokens on disk, about: whole windows for training, whole shards for validation.

    The last shard is full with the bundle of text that fills it, and the text may be shorter.
    """
    from adafrugal.data.tokens.preparation import VALIDATION_TOKENS

    data, read = settings.data, settings.eval
    each = 2 if (settings.model.vocabulary_size or 1 << 17) <= 1 << 16 else 4  # None: its config.json has it
    windows = -(-tokens // data.window_tokens)
    if data.store_limit_gib is not None:
        windows = min(windows, math.ceil(data.store_limit_gib * 2**30 / (data.window_tokens * each)))
    shards = -(-max(read.tokens, read.last_tokens or 0) // VALIDATION_TOKENS)
    of_validation = shards * VALIDATION_TOKENS * (each + 4)  # 4: how many bytes of text a token is
    return windows * data.window_tokens * each + of_validation


def _memory_key(settings: Settings) -> str:
    """Return what decides the memory: neither the rate, nor the seed unless blocks are drawn in a random order."""
    optimizer, seed = copy.copy(settings.optimizer), None
    if optimizer.kind == "frugal":
        seed = settings.seed if choices.described(optimizer.subspace)[1].get("order") == "random" else None
        if optimizer.interval.get("kind") in ("constant", "loss_aware"):  # they keep no gradients
            optimizer.interval = None
    optimizer.lr = bool(optimizer.lr)
    asked = [getattr(settings.data, name, None) for name in ("classes", "mask_documents")]
    return repr((settings.model, optimizer, settings.trainer, seed, asked))


def _time_key(settings: Settings) -> str:
    """Return what decides the time of a step."""
    length = replace(settings.trainer, steps=None)
    masked = settings.data.mask_documents
    return repr((settings.model, replace(settings.optimizer, lr=1.0), length, masked))
