"""FLOPs of a decoder's passes, counted from its shape: 2 for each multiply-add of a matrix product. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from adafrugal.settings.schema import LlamaSettings, Settings


@dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass for each token."""

    blocks: int
    head: int

    @property
    def all(self) -> int:
        """The sum."""
        return self.blocks + self.head


def forward(shape: LlamaSettings, length: int) -> Forward:
    """Count a LLaMA's forward pass over rows of `length` tokens; for each token.

    Products with weights: four of hidden × hidden and three of hidden × intermediate in each block, and the head's.
    Attention's own, queries with keys and shares with values, count as whole squares of length × length: kernels may
    leave out the half that is masked. The input embedding, norms and activation functions have no products.
    """
    hidden = shape.hidden_size
    weights = 4 * hidden * hidden + 3 * hidden * shape.intermediate_size
    attention = 2 * length * hidden
    return Forward(2 * shape.num_hidden_layers * (weights + attention), 2 * hidden * shape.vocabulary_size)


def trained(settings: Settings) -> int:
    """Count the model FLOPs of training on one token: the backward pass has two products for each of the forward's."""
    return 3 * forward(settings.model, settings.trainer.sequence_length).all


def recomputed(settings: Settings) -> int:
    """Count the FLOPs for each trained token that hardware makes again: parts of the forward pass, to save memory.

    `activation_checkpointing=layers` repeats the blocks but for the last product of each, which the backward pass does
    not need; `selective` keeps the results of all products. A number of `loss_chunk_rows` repeats the head; `auto` does
    so on a card that is small for the batch, which is not counted.
    """
    shape, trainer = settings.model, settings.trainer
    once, again = forward(shape, trainer.sequence_length), 0
    if trainer.activation_checkpointing == "layers":
        again += once.blocks - 2 * shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size
    rows = (trainer.micro_batch_size or trainer.batch_size) * trainer.sequence_length
    if isinstance(shape.loss_chunk_rows, int) and shape.loss_chunk_rows < rows:
        again += once.head
    return again
