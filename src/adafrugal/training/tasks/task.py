"""The interface of a task, which gives the loop its model, batches, loss and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepBatch(NamedTuple):
    """One process's part of a step.

    Args:
        batches: its micro-batches, on the CPU; every process has the same number.
        count: the targets or examples of the whole step, over all processes, that the loss is averaged over.
        tokens: of the whole step.
        real_tokens: of these, without padding.
    """

    batches: Sequence[Any]
    count: int
    tokens: int
    real_tokens: int


class Task(Protocol):
    """Model, batches, loss and evaluation.

    Attributes:
        model: on the run's device, with float32 weights.
        module: called by `forward`; wraps or shards the model where there are several processes.
        forward: maps a batch's tensors on the device to its loss, autocast included; torch.compile may replace it.
        shapes_vary: whether batches have many shapes.
        saved: parts of a checkpoint in transformers' format: `model`, and `tokenizer` if the model came with one.
        last_is_alike: whether the last evaluation reads the same data as those before it.
        headline: names of the evaluation's numbers that are displayed beside the loss.
    """

    model: PreTrainedModel
    module: nn.Module
    forward: Callable[..., Any]
    shapes_vary: bool
    saved: dict[str, Any]
    last_is_alike: bool
    headline: tuple[str, ...]

    def shapes(self) -> Iterable[Any]:
        """A batch of each shape that the run will see; one batch if shapes vary."""

    @property
    def data(self) -> dict[str, Any]:
        """Identity and size of the data, for the record."""

    @property
    def epoch(self) -> int | None:
        """The number of steps of an epoch; None if the length of the training data is unknown."""

    def epochs(self, steps: int) -> float | None:
        """How often the training data have been read after so many steps."""

    def is_ready(self, step: int, timeout: float) -> bool:
        """Whether `work` would answer at once, after at most `timeout` seconds of waiting for it."""

    def work(self, step: int) -> StepBatch:
        """One process's part of a step: a pure function of seed, step and rank."""

    def rows(self, step: int) -> list[int]:
        """Indices of the rows or examples in a step's batch, for the record."""

    def loss(self, batch: Any) -> Tensor:
        """The summed loss of a micro-batch: a float32 scalar on the device."""

    def evaluate(self, last: bool) -> dict[str, float]:
        """`validation_loss` and further numbers named `validation_…`; `last`: it ends the run (`eval.last_tokens`)."""

    def is_better(self, line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether one evaluation is better than another."""

    def conclude(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The summary's part of this task, from the lines of metrics that end with an evaluation, in order."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which a resumed run continues its data."""

    def close(self) -> None:
        """End the work in the background."""
