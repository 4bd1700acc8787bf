"""Each metric against a value worked out by hand."""

import math

import numpy as np
import pytest

from adafrugal.settings.data_settings import METRICS
from adafrugal.training.tasks import metrics

# labels 1 1 1 0 0 0 1 0, found 1 1 0 0 0 1 1 0: three of four ones found, one zero taken for a one
LABELS = np.array([1, 1, 1, 0, 0, 0, 1, 0])
FOUND = np.array([1, 1, 0, 0, 0, 1, 1, 0])
LOGITS = np.eye(2)[FOUND] * 3 - 1
HANDMADE = {
    "accuracy": 6 / 8,
    "f1": 2 * 3 / (2 * 3 + 1 + 1),  # 2·TP ÷ (2·TP + FP + FN)
    "matthews": (3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4),  # (TP·TN − FP·FN) ÷ √…
}


@pytest.mark.parametrize("metric", METRICS["classes"])
def test_classes(metric):
    assert metrics.scores([metric], LABELS, LOGITS) == {metric: pytest.approx(HANDMADE[metric])}


@pytest.mark.parametrize(
    ("labels", "found", "expected"),
    [
        # deviations −2 −1 0 3 and −4.5 −0.5 0.5 4.5: their product sums to 23, squares to 14 and 41
        ([0.0, 1, 2, 5], [0.0, 4, 5, 9], {"pearson": 23 / math.sqrt(14 * 41), "spearman": 1.0}),
        # ranks that tie share their place, 1 2 3 and 1.5 1.5 3: covariance 1.5, variances 2 and 1.5
        ([1.0, 2, 3], [1.0, 1.0, 4.0], {"spearman": 1.5 / math.sqrt(2 * 1.5)}),
    ],
)
def test_scores(labels, found, expected):
    assert metrics.scores([*expected], np.array(labels), np.array(found)[:, None]) == pytest.approx(expected)


def test_what_is_not_defined_is_nan_or_nought_and_warns_nobody(recwarn):
    same = np.ones((4, 1))
    assert math.isnan(metrics.scores(["pearson"], np.arange(4.0), same)["pearson"])
    assert math.isnan(metrics.scores(["spearman"], np.arange(4.0), same)["spearman"])
    one_class = np.array([[1.0, 0.0]] * 8)
    assert metrics.scores(["matthews", "f1"], LABELS, one_class) == {"matthews": 0.0, "f1": 0.0}
    assert not recwarn.list


def test_the_settings_name_the_metrics_that_there_are():
    assert {m for known in METRICS.values() for m in known} == set(metrics.METRICS)


@pytest.mark.parametrize(
    ("new", "old", "is_better"), [(2, 1, True), (1, 1, False), (math.nan, 1, False), (1, math.nan, True)]
)
def test_nan_is_worse_than_any_number(new, old, is_better):
    assert metrics.better(new, old) is is_better
