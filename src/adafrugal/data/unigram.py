"""The loss of a model that knows only how often each token occurs: what a language model must beat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from adafrugal.data.batches import IGNORED, Batch


def unigram_loss(train: np.ndarray, vocabulary: int, batches: Iterable[Batch]) -> float:
    """Mean nats per target under the token frequencies of the training part, each count raised by one.

    Args:
        train: token ids [tokens].
        vocabulary: the number of ids.
        batches: what is predicted.
    """
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    nats = -np.log(counts / counts.sum())
    targets = np.concatenate([b.targets[b.targets != IGNORED].numpy() for b in batches])
    return float(nats[targets].mean())
