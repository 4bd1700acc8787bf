"""The task of predicting the next token: model, batches, loss and evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafrugal.data.corpus import Corpus
from adafrugal.data.rows import Batch
from adafrugal.data.text import as_transformers, faults
from adafrugal.memory import on_device
from adafrugal.models import decoder, llama
from adafrugal.models.loss import TokenNats
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.settings.schema import DecoderSettings, Settings
from adafrugal.system.errors import RunError
from adafrugal.training.distributed import parallel
from adafrugal.training.tasks.task import StepBatch, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sized(settings: Settings) -> Settings:
    """The settings with the vocabulary size of a decoder that is read."""
    with faults.of_model("model.name", str(settings.model.name)):
        return decoder.sized(settings)


class Pretrain(Task):
    """Causal language modelling, from random weights or from others."""

    headline = ("validation_perplexity",)
    epoch = None  # the length of a text may be unknown
    shapes_vary = False

    def _build(self, settings: Settings, say: Callable[[str], None], state: dict[str, Any] | None) -> None:
        place = self.place
        self._length, self._masked = settings.trainer.sequence_length, settings.data.mask_documents
        self.last_is_alike = settings.eval.last_tokens in (None, settings.eval.tokens)
        self._corpus = self._text(settings, say, state)
        self._weights = self._fingerprint_of_weights(settings.model, state)
        torch.manual_seed(settings.seed)
        with parallel.made_on(place.device, settings.trainer):
            self.model = self._model(settings.model, reads=state is None)
        if settings.model.kind == "llama" and not settings.data.mask_documents:
            llama.attend_causally(self.model)
        checkpoint_activations(self.model, settings.trainer.activation_checkpointing)
        nats = TokenNats(self.model, on_device.chunk_rows(settings, place.memory(), self.ranks.size))
        self.module = parallel.spread(nats, settings.trainer, place, self.ranks)
        weights = decoder.weights_of(settings.model) if state is None else None
        self._make_whole(settings.data.tokenizer.normalization, weights, say)

    def _model(self, settings: Any, reads: bool) -> PreTrainedModel:
        """The model, with the weights that its settings name, if it `reads` them."""
        if isinstance(settings, DecoderSettings):
            with faults.of_model("model.name", str(settings.name)):
                return decoder.build(settings, reads)
        model = llama.build(settings, self._padding())
        if reads and settings.weights is not None:
            with faults.of_model("model.weights", settings.weights):
                decoder.read_weights(model, settings)
        return model

    def _padding(self) -> int | None:
        """The id that is for padding alone; None if the end of a document pads, too."""
        tokenizer = self._corpus.plan.tokenizer
        return None if tokenizer.pad == tokenizer.end else tokenizer.pad

    def _fingerprint_of_weights(self, settings: Any, state: dict[str, Any] | None) -> str | None:
        """The hash of the weights with which the run began; one that goes on needs them no more, but not others."""
        place, before = decoder.weights_of(settings), (state or {}).get("pretrained_weights")
        now = self.ranks.tell(decoder.fingerprint(place) if place is not None and self.ranks.first else None)
        if None not in (before, now) and now != before:
            raise RunError(
                f"the weights in {place} are not those with which the run began (fingerprint {before[:12]}, now "
                f"{now[:12]}): bring those back, or remove the run's directory to begin anew"
            )
        return before or now

    def _make_whole(self, normalization: str, weights: str | None, say: Callable[[str], None]) -> None:
        """Make the tokenizer's files for transformers, and tell the model how the run ends and pads a document.

        Say so if the run begins with `weights` that lie beside a tokenizer of other ids.
        """
        tokenizer = self._corpus.plan.tokenizer
        for config in (self.model.config, self.model.generation_config):
            config.eos_token_id, config.pad_token_id = tokenizer.end, tokenizer.pad
        self.model.generation_config.use_cache = True  # training has none
        self.files, differs = as_transformers.export(tokenizer, normalization)
        if differs is not None and self.ranks.first:
            say(f"AutoTokenizer will give the text {differs[:40]!r} other ids than this run does; see docs/runs.md")
        if weights is not None and self.ranks.first:
            theirs = Path(weights) / "tokenizer.json"
            ids, known = _ids(self.files.get(theirs.name)), _ids(theirs.read_bytes() if theirs.is_file() else None)
            if None not in (ids, known) and ids != known:
                name = f"data.tokenizer.kind=pretrained data.tokenizer.name={weights}"
                say(f"the weights in {weights} know other ids, those of the tokenizer there; to use it: {name}")

    def _text(self, settings: Settings, say: Callable[[str], None], state: dict[str, Any] | None) -> Corpus:
        with self.ranks.first_goes_first():  # one process trains the tokenizer and prepares the tokens
            return Corpus(settings, say, state, self.ranks.size, pin=self.place.is_gpu)

    def shapes(self) -> Iterator[Batch]:
        """A batch of each shape that the run will see."""
        mine = -(-self._batch_size // self.ranks.size)  # rows of this process
        starts = range(0, mine, self._micro_batch_size)
        for rows in sorted({min(self._micro_batch_size, mine - start) for start in starts}, reverse=True):
            tokens, targets, positions = torch.zeros(3, rows, self._length, dtype=torch.int64)
            yield Batch(tokens, targets, torch.full((rows,), self._length), positions if self._masked else None)

    @property
    def data(self) -> dict[str, Any]:
        """The identity and the size of the data."""
        return self._corpus.about | ({"pretrained_weights": self._weights} if self._weights else {})

    def epochs(self, steps: int) -> float | None:
        """How often the training text has been read after so many steps; None where its length is not known."""
        return self._corpus.epochs(steps)

    def is_ready(self, step: int, timeout: float) -> bool:
        """Whether `work` would answer at once, after at most `timeout` seconds of waiting for it."""
        return self._corpus.batches.is_ready(step, timeout)

    def work(self, step: int) -> StepBatch:
        """Consecutive rows of a step's batch: those of this process."""
        whole = self._corpus.batches(step)
        mine = whole.share(self.ranks.rank, self.ranks.size)
        batches = list(mine.split(self._micro_batch_size))
        return StepBatch(batches, whole.count(), whole.tokens.numel(), whole.real_tokens())

    def rows(self, step: int) -> list[int]:
        """Indices of a step's rows in the order in which the run reads them."""
        return list(range((step - 1) * self._batch_size, step * self._batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which a resumed run continues its data."""
        return self._corpus.state_dict() | ({"pretrained_weights": self._weights} if self._weights else {})

    def close(self) -> None:
        """End the work in the background."""
        self._corpus.close()

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch, in nats: a float32 scalar on the device."""
        there = batch.to(self.place.device)
        return self.forward(there.tokens, there.targets, there.positions)

    def _forward(self, tokens: Tensor, targets: Tensor, positions: Tensor | None) -> Tensor:
        """The region that may be compiled: int64 [rows, length] each → the summed loss, a float32 scalar."""
        with self.place.autocast():
            return self.module(tokens, targets, positions)

    def _evaluate(self, last: bool) -> dict[str, float]:
        """Loss (nats per token), perplexity and bits per byte of the same held-out tokens; the last may read more."""
        held_out = self._corpus.last_validation if last else self._corpus.validation
        shares = (batch.share(self.ranks.rank, self.ranks.size) for batch in held_out.batches)
        (nats,) = self.ranks.sum([torch.stack([self.loss(batch).double() for batch in shares]).sum().item()])
        loss = nats / held_out.tokens
        return {
            "validation_loss": loss,
            "validation_perplexity": math.exp(loss) if loss < 700 else math.inf,
            "validation_bits_per_byte": nats / math.log(2) / max(1, held_out.text_bytes),
        }

    def is_better(self, line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether one evaluation is better than another."""
        return line["validation_loss"] < other["validation_loss"]

    def conclude(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Best validation loss, and the unigram baseline of the first window.

        A last evaluation on other tokens than the rest does not count as the best.
        """
        alike = evaluations if self.last_is_alike else evaluations[:-1] or evaluations
        best, unigram = min(alike, key=lambda line: line["validation_loss"]), self._corpus.unigram_loss
        return {
            "best_validation_loss": {"step": best["step"], "value": best["validation_loss"]},
            "unigram": {"loss": unigram, "perplexity": math.exp(unigram)},
        }


def _ids(file: bytes | None) -> Any:
    """The ids by token in a tokenizer.json; None if there is none that can be read."""
    try:
        return json.loads(file or b"")["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return None
