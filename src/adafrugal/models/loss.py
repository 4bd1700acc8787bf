"""The next-token loss of a decoder, whole or in chunks of rows, and the loss of labelled examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint


class TokenNats(nn.Module):
    """Sum the cross-entropy of a decoder over a batch. A module, since DDP and `fully_shard` wrap a whole forward pass.

    Logits have the autocast type and become float32 before the softmax.

    Args:
        model: a transformers decoder: its `base_model` gives hidden states, its output embeddings logits.
        chunk_rows: positions whose logits are held at once, each chunk recomputed in the backward pass; None: all. The
            logits of a whole batch are otherwise the largest tensor of a small model.
    """

    def __init__(self, model: nn.Module, chunk_rows: int | None = None) -> None:
        super().__init__()
        self.model, self._chunk_rows = model, chunk_rows

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return nats, a float32 scalar.

        Args:
            tokens: int64 (rows, length).
            targets: int64 (rows, length); -100 is not counted.
            positions: int64 (rows, length), which restart at each document of a row and confine attention to it;
                None: a row is one text.
        """
        states = self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        states, targets, head = states.flatten(0, 1), targets.flatten(), self.model.get_output_embeddings()
        if self._chunk_rows is None:
            return _nats(head, states, targets)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for rows, wanted in zip(states.split(self._chunk_rows), targets.split(self._chunk_rows), strict=True):
            total = total + checkpoint(_nats, head, rows, wanted, use_reentrant=False)
        return total


def _nats(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(states).float(), targets, reduction="sum")


def of_examples(
    model: nn.Module, tokens: Tensor, mask: Tensor, types: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of labelled examples, and the outputs of an encoder's head.

    Both are float32: a scalar, of cross-entropy in nats, or of squared errors where labels are scores; and
    (examples, classes), or (examples, 1) for scores.

    Args:
        model: of transformers, for the classification of sequences.
        tokens: int64 (examples, length).
        mask: int64 (examples, length), 0 for padding.
        types: int64 (examples, length), the sentence that has a token; None: the model takes none.
        labels: (examples), int64 classes or float32 scores.
    """
    more = {} if types is None else {"token_type_ids": types}
    outputs = model(input_ids=tokens, attention_mask=mask, **more).logits.float()
    if labels.is_floating_point():
        return mse_loss(outputs.squeeze(1), labels, reduction="sum"), outputs
    return cross_entropy(outputs, labels, reduction="sum"), outputs
