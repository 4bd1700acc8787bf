"""The metrics that fine-tuning reports, by scikit-learn and scipy."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def _metric(module: str, name: str, **more: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    """A metric of scikit-learn or a correlation of scipy, imported when it is used."""

    def metric(labels: np.ndarray, found: np.ndarray) -> float:
        value = getattr(importlib.import_module(module), name)(labels, found, **more)
        return float(getattr(value, "statistic", value))

    return metric


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _metric("sklearn.metrics", "accuracy_score"),
    "f1": _metric("sklearn.metrics", "f1_score", zero_division=0),  # of class 1
    "matthews": _metric("sklearn.metrics", "matthews_corrcoef"),
    "pearson": _metric("scipy.stats", "pearsonr"),
    "spearman": _metric("scipy.stats", "spearmanr"),
}


def scores(metrics: Sequence[str], labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """Metric -> its value, between 0 and 1, or −1 and 1 for correlations; NaN where it is not defined.

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
