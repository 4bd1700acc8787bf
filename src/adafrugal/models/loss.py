"""The next-token loss of a decoder, whole or in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def token_nats(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    chunk_rows: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The summed cross-entropy of a batch in nats, a float32 scalar.

    Logits are made in the autocast type and turned into float32 before the softmax.

    Args:
        model: a transformers decoder: `model.model` gives hidden states, `model.lm_head` logits.
        tokens: int64 [rows, length].
        targets: int64 [rows, length]; -100 is not counted.
        chunk_rows: how many positions' logits to hold at once, each chunk made again in the backward pass.
            The logits of a whole batch are otherwise the largest tensor of a small model. None: all at once.
        positions: int64 [rows, length], counted anew in each of several documents in a row: attention then stays
            within a document. None: a row is one text.
    """
    hidden = model.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
    targets = targets.flatten()
    if chunk_rows is None:
        return _nats(model.lm_head, hidden, targets)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, wanted in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
        total = total + checkpoint(_nats, model.lm_head, rows, wanted, use_reentrant=False)
    return total


class TokenNats(nn.Module):
    """`token_nats` of one model, as a module: what DDP and `fully_shard` wrap, since its call is a whole forward pass.

    Args:
        model: a transformers decoder.
        chunk_rows: of `token_nats`.
    """

    def __init__(self, model: nn.Module, chunk_rows: int | None = None) -> None:
        super().__init__()
        self.model, self._chunk_rows = model, chunk_rows

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
        """The summed cross-entropy of a batch in nats, a float32 scalar."""
        return token_nats(self.model, tokens, targets, self._chunk_rows, positions)


def _nats(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")
