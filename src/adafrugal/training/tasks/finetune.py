"""The task of fine-tuning a pretrained encoder to predict classes or scores of sentences and pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafrugal.data.labelled import Labelled, LabelledBatch, TrainingOrder
from adafrugal.data.text import as_transformers, faults
from adafrugal.models import encoder
from adafrugal.models.loss import of_examples
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.settings.schema import EncoderSettings, Settings
from adafrugal.system.errors import SettingError
from adafrugal.training.tasks.metrics import better, scores
from adafrugal.training.tasks.task import StepBatch, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Finetune(Task):
    """Fine-tuning of an encoder on labelled examples, in one process: several are refused, as dropout would differ."""

    last_is_alike = True
    shapes_vary = True  # a batch is as long as its longest example

    def _build(self, settings: Settings, say: Callable[[str], None], state: dict[str, Any] | None) -> None:
        data, trainer, place = settings.data, settings.trainer, self.place
        self._metrics = list(data.metrics)
        torch.manual_seed(settings.seed)  # of the new head
        self.model, tokenizer, weights = _encoder(settings.model, data.classes or 1)
        self.files = as_transformers.saved(tokenizer)  # before it is used, which sets how it truncates
        longest = encoder.longest_input(self.model, tokenizer)
        if trainer.sequence_length > longest:
            given = f"trainer.sequence_length is {trainer.sequence_length}"
            raise SettingError(f"{given}; allowed: up to what the encoder takes, {longest}")
        say(f"reading {data.source} {data.subset or ''}".rstrip())
        self._labelled = Labelled(data, tokenizer, trainer.sequence_length, Path(settings.cache_root).absolute())
        self._fingerprint = self._labelled.fingerprint_with(weights)
        if state:
            faults.refuse_other_data(state["fingerprint"], self._fingerprint)
        self._order = TrainingOrder(self._labelled.train.lengths(), trainer.batch_size, settings.data_seed)
        self.model = self.model.to(place.device).train()
        checkpoint_activations(self.model, trainer.activation_checkpointing)
        self.module = self.model
        self.data = self._labelled.about() | {"pretrained_weights": weights}
        self.epoch = self._order.steps
        self._prefixes = ["validation"]  # of the names of each validation set's numbers
        self._prefixes += [f"validation_{name.removeprefix('validation_')}" for name in data.validation_splits[1:]]
        self.headline = tuple(f"{prefix}_{metric}" for prefix in self._prefixes for metric in self._metrics)

    def shapes(self) -> Iterator[LabelledBatch]:
        """One batch; torch.compile leaves its sizes open."""
        yield self.work(1).batches[0]

    def epochs(self, steps: int) -> float:
        """How often the training examples have been seen after so many steps."""
        return steps / self.epoch

    def work(self, step: int) -> StepBatch:
        """A step's examples in micro-batches, each padded to its longest example."""
        places, size = self._order[step], self._micro_batch_size
        batches = [self._labelled.train.batch(places[i : i + size]) for i in range(0, len(places), size)]
        sums = zip(*((b.count(), b.tokens.numel(), b.real_tokens()) for b in batches), strict=True)
        return StepBatch(batches, *(sum(numbers) for numbers in sums))

    def rows(self, step: int) -> list[int]:
        """Indices of a step's examples in the training split, or in the part of `data.examples`."""
        return self._order[step].tolist()

    def loss(self, batch: LabelledBatch) -> Tensor:
        """The summed loss of a micro-batch: cross-entropy in nats, or the squared error of scores."""
        return self._loss_and_outputs(batch)[0]

    def _evaluate(self, last: bool) -> dict[str, float]:
        """Loss and metrics of each whole validation set: the first's are `validation_…`, any other's `…_<split>_…`."""
        found: dict[str, float] = {}
        for prefix, examples in zip(self._prefixes, self._labelled.validation.values(), strict=True):
            outputs, labels, losses = [], [], []
            for batch in examples.by_length(self._micro_batch_size):
                loss, given = self._loss_and_outputs(batch)
                losses.append(loss.double())
                outputs.append(given)
                labels.append(batch.labels)
            found[f"{prefix}_loss"] = torch.stack(losses).sum().item() / len(examples)
            values = scores(self._metrics, torch.cat(labels).numpy(), torch.cat(outputs).cpu().numpy())
            found |= {f"{prefix}_{metric}": value for metric, value in values.items()}
        return found

    def is_better(self, line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether one evaluation is better than another, by the first metric."""
        main = f"validation_{self._metrics[0]}"
        return better(line[main], other[main])

    def conclude(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Every metric at the last evaluation and at the best by the first metric, with the step of each."""
        main, best = f"validation_{self._metrics[0]}", evaluations[0]
        for line in evaluations[1:]:
            best = line if self.is_better(line, best) else best
        kept = ("step", "validation_loss", *self.headline)
        at = {name: {key: line[key] for key in kept} for name, line in (("last", evaluations[-1]), ("best", best))}
        return {"metric": main, "metrics": list(self.headline), **at}

    def state_dict(self) -> dict[str, Any]:
        """The fingerprint of data and weights, which a resume compares; a batch depends on its step alone."""
        return {"fingerprint": self._fingerprint}

    def _loss_and_outputs(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """The summed loss of a micro-batch, and the head's outputs."""
        there = batch.to(self.place.device)
        return self.forward(there.tokens, there.mask, there.types, there.labels)

    def _forward(self, tokens: Tensor, mask: Tensor, types: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The region that may be compiled: as `of_examples`."""
        with self.place.autocast():
            return of_examples(self.model, tokens, mask, types, labels)


def _encoder(settings: EncoderSettings, outputs: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    with faults.of_model("model.name", str(settings.name or settings.package)):
        return encoder.load(settings, outputs)
