"""The task of predicting the next token: model, batches, loss and evaluation, as the loop wants them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adafrugal.config import Settings, tokenizer_size
from adafrugal.data import store
from adafrugal.data.batches import IGNORED, Batch, PackedRows, TrainingBatches, validation_batches
from adafrugal.data.unigram import unigram_loss
from adafrugal.models import llama
from adafrugal.models.loss import token_nats
from adafrugal.training.devices import Place


class Pretrain:
    """Causal language modelling from random weights.

    Args:
        settings: of the run.
        place: device and precision.
        say: told what takes long, in a sentence.
    """

    def __init__(self, settings: Settings, place: Place, say: Callable[[str], None]) -> None:
        length, batch_size = settings.trainer.sequence_length, settings.trainer.batch_size
        self._place = place
        self._chunk_rows = settings.model.loss_chunk_rows
        self._nats = torch.compile(token_nats) if settings.trainer.compile else token_nats
        self._micro_batch_size = settings.trainer.micro_batch_size or batch_size
        cache = Path(settings.cache_root).absolute()
        self._store = store.prepare(tokenizer_size(settings), settings.data.tokenizer.model_type, cache, say)
        rows = PackedRows(self._store.train, length)
        self._batches = TrainingBatches(rows, settings.seed, batch_size, settings.trainer.steps, settings.data.repeat)
        held_out = PackedRows(self._store.validation, length)
        self._validation = validation_batches(held_out, settings.eval.tokens, length, self._micro_batch_size)
        self._lengths = torch.from_numpy(self._store.tokenizer.byte_lengths())
        torch.manual_seed(settings.seed)
        self.model = llama.build(settings.model).to(place.device)

    @property
    def data(self) -> dict[str, Any]:
        """What identifies the data, and how much there is of it."""
        return self._store.about

    def epochs(self, steps: int) -> float:
        """How often the training text has been read after so many steps."""
        return self._batches.epochs(steps)

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of a step, on the CPU."""
        return list(self._batches[step].split(self._micro_batch_size))

    def nats(self, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch, in nats: a float32 scalar on the device."""
        there = batch.to(self._place.device)
        with self._place.autocast():
            return self._nats(self.model, there.tokens, there.targets, self._chunk_rows)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss (nats per token), perplexity and bits per byte of the same held-out tokens every time.

        Runs in training's own precision, so that the two losses compare.
        """
        was_training = self.model.training
        self.model.eval()
        nats = torch.stack([self.nats(batch).double() for batch in self._validation]).sum().item()
        self.model.train(was_training)
        tokens = sum(batch.count() for batch in self._validation)
        targets = torch.cat([batch.targets[batch.targets != IGNORED] for batch in self._validation])
        loss = nats / tokens
        return {
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss) if loss < 700 else math.inf,
            "validation_bits_per_byte": nats / math.log(2) / self._lengths[targets].sum().item(),
        }

    def yardstick(self) -> dict[str, float]:
        """What a model that knows only token frequencies reaches on the same tokens."""
        loss = unigram_loss(self._store.train, self._store.tokenizer.size, self._validation)
        return {"loss": loss, "perplexity": math.exp(loss)}
