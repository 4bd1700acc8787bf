"""The interface of a task, which gives the loop its model, batches, loss and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from adafrugal.settings.schema import Settings
from adafrugal.training.devices import Place
from adafrugal.training.distributed.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepBatch(NamedTuple):
    """One process's part of a step, and numbers of the whole step, over all processes."""

    batches: Sequence[Any]  # micro-batches on the CPU; every process has the same number
    count: int  # targets or examples, that the loss is averaged over
    tokens: int
    real_tokens: int  # without padding


class Task:
    """Model, batches, loss and evaluation of a run, for one of the processes that share it.

    `say` prints a sentence about work that takes long; `state` is from `state_dict`, of the run to continue.
    """

    model: PreTrainedModel  # on the run's device, with float32 weights
    module: nn.Module  # called by `forward`; wraps or shards the model where there are several processes
    shapes_vary: bool  # whether batches have many shapes
    files: Mapping[str, bytes]  # by name: the tokenizer for transformers, to stand in each checkpoint
    last_is_alike: bool  # the last evaluation reads the same data as those before it
    headline: tuple[str, ...]  # names of the evaluation's numbers that are displayed beside the loss
    epoch: int | None  # steps of an epoch; None if the length of the training data is unknown
    data: dict[str, Any]  # their identity and size, for the record

    def __init__(
        self,
        settings: Settings,
        place: Place,
        say: Callable[[str], None],
        state: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.place, self.ranks = place, ranks or Ranks()  # None: one process
        self._batch_size = settings.trainer.batch_size
        self._micro_batch_size = settings.trainer.micro_batch_size or self._batch_size
        self._build(settings, say, state)
        self.forward: Callable[..., Any] = self._forward  # torch.compile may replace it

    def _build(self, settings: Settings, say: Callable[[str], None], state: dict[str, Any] | None) -> None:
        """Read the data and build the model."""

    def _forward(self, *tensors: Tensor | None) -> Any:
        """Map a batch's tensors on the device to its loss, autocast included: the region that may be compiled."""

    def shapes(self) -> Iterable[Any]:
        """A batch of each shape that the run will see; one batch if shapes vary."""

    def epochs(self, steps: int) -> float | None:
        """How often the training data have been read after so many steps."""

    def is_ready(self, step: int, timeout: float) -> bool:
        """Whether `work` would answer at once, after at most `timeout` seconds of waiting for it."""
        return True

    def work(self, step: int) -> StepBatch:
        """One process's part of a step: a pure function of seed, step and rank."""

    def rows(self, step: int) -> list[int]:
        """Indices of the rows or examples in a step's batch, for the record."""

    def loss(self, batch: Any) -> Tensor:
        """The summed loss of a micro-batch: a float32 scalar on the device."""

    @torch.no_grad()
    def evaluate(self, last: bool) -> dict[str, float]:
        """`validation_loss` and more numbers `validation_…`, in the precision of training; `last`: it ends the run."""
        self.model.eval()
        found = self._evaluate(last)
        self.model.train()
        return found

    def _evaluate(self, last: bool) -> dict[str, float]:
        """The same, of a model that is in evaluation mode."""

    def is_better(self, line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether one evaluation is better than another."""

    def conclude(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The summary's part of this task, from the lines of metrics that end with an evaluation, in order."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which a resumed run continues its data."""

    def close(self) -> None:
        """End the work in the background."""
