"""The metrics that fine-tuning reports, by scikit-learn and scipy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np


def scores(metrics: Sequence[str], labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """Metric -> its value, between 0 and 1, or −1 and 1 for correlations.

    A metric that is not defined (a correlation with outputs that are all alike) is NaN.

    Args:
        metrics: names of `METRICS`.
        labels: [examples], classes or scores.
        outputs: [examples, classes] logits, or [examples, 1] scores.
    """
    found = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn and scipy warn where a value is not defined
        return {metric: METRICS[metric](labels, found) for metric in metrics}


def better(new: float, old: float) -> bool:
    """Whether a score is better than an earlier one; NaN is worse than any number."""
    return not math.isnan(new) and (math.isnan(old) or new > old)


def _accuracy(labels: np.ndarray, found: np.ndarray) -> float:
    """The share of the examples whose class is found."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, found))


def _f1(labels: np.ndarray, found: np.ndarray) -> float:
    """The harmonic mean of precision and recall of class 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, found, zero_division=0))


def _matthews(labels: np.ndarray, found: np.ndarray) -> float:
    """Matthews' correlation of classes: 0 where only one is found."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, found))


def _pearson(labels: np.ndarray, found: np.ndarray) -> float:
    """The linear correlation of scores."""
    from scipy.stats import pearsonr

    return float(pearsonr(labels, found).statistic)


def _spearman(labels: np.ndarray, found: np.ndarray) -> float:
    """The correlation of the scores' ranks."""
    from scipy.stats import spearmanr

    return float(spearmanr(labels, found).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
