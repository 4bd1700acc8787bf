"""The loss of a model that knows only how often each token occurs: what a language model must beat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from adafrugal.data.batches import Batch
from adafrugal.data.rows import IGNORED


def unigram_loss(train: Sequence[np.ndarray], vocabulary: int, batches: Iterable[Batch]) -> float:
    """Mean nats per target under the token frequencies of training text, each count raised by one.

    Args:
        train: token ids, some arrays of them.
        vocabulary: the number of ids.
        batches: what is predicted.
    """
    counts = sum((np.bincount(tokens, minlength=vocabulary) for tokens in train), np.ones(vocabulary))
    nats = -np.log(counts / counts.sum())
    targets = np.concatenate([b.targets[b.targets != IGNORED].numpy() for b in batches])
    return float(nats[targets].mean())
