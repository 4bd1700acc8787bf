"""What a run trains for: a task gives the loop its model, batches, loss and evaluation, and nothing else differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepBatch(NamedTuple):
    """One process's part of a step.

    Args:
        batches: its micro-batches, on the CPU; as many as every other process has.
        count: what the loss is averaged over: targets or examples of the whole step, over all processes.
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
        module: what `forward` calls; copies and shards of it hold the model's weights.
        forward: from a batch's tensors on the device to its loss, autocast included: what torch.compile may replace.
        shapes_vary: whether batches have many shapes.
        saved: what a checkpoint has in transformers' own format: `model`, and `tokenizer` where it came with one.
        last_is_alike: whether the evaluation that ends the run compares with those before it.
        headline: which of the evaluation's numbers, beside the loss, are shown while the run goes on.
    """

    model: PreTrainedModel
    module: nn.Module
    forward: Callable[..., Any]
    shapes_vary: bool
    saved: dict[str, Any]
    last_is_alike: bool
    headline: tuple[str, ...]

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes in a step of this process."""

    def shapes(self) -> Iterable[Any]:
        """A batch of each shape that the run will see; of one where shapes vary."""

    @property
    def data(self) -> dict[str, Any]:
        """Identity and size of the data, for the record."""

    @property
    def epoch(self) -> int | None:
        """The steps of one; None where the length of the training data is not known, or does not matter."""

    def epochs(self, steps: int) -> float | None:
        """How often the training data have been read after so many steps."""

    def is_ready(self, step: int, timeout: float) -> bool:
        """Whether `work` would answer at once, after at most `timeout` seconds of waiting for it."""

    def work(self, step: int) -> StepBatch:
        """One process's part of a step: a pure function of seed, step and rank."""

    def rows(self, step: int) -> list[int]:
        """The numbers of the rows or examples in a step's batch, for a person who looks for one."""

    def loss(self, batch: Any) -> Tensor:
        """The summed loss of a micro-batch: a float32 scalar on the device."""

    def evaluate(self, last: bool) -> dict[str, float]:
        """`validation_loss` and further numbers named `validation_…`; `last`: it ends the run (`eval.last_tokens`)."""

    def is_better(self, line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether one evaluation is better than another."""

    def conclude(self, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The summary's part of this task, from the lines of metrics that end with an evaluation, in order."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which the batch after the last one is read."""

    def close(self) -> None:
        """End what works in the background."""
