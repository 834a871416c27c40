"""The sentiment metrics give MMSA's numbers."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mtmd.results.metrics import msa_metrics

KEYS = ["acc7", "acc5", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr"]


def test_values_that_mmsa_itself_gives():
    targets = [-3, -2.4, -1.5, -0.5, 0, 0, 0.4, 0.5, 1.5, 2.5, 3, -1]
    predictions = [-3.7, -0.6, -2.5, 0, 0.2, -0.7, -0.1, 0.49, 2.5, 1.51, 2.1, -0.5]
    metrics = msa_metrics(predictions, targets)
    assert list(metrics) == KEYS
    assert {key: round(value, 4) for key, value in metrics.items()} == {
        "acc7": 0.6667,
        "acc5": 0.75,
        "acc2_has0": 0.75,
        "acc2_non0": 0.9,
        "f1_has0": 0.7517,
        "f1_non0": 0.8990,
        "mae": 0.7333,
        "corr": 0.8759,
    }


def mmsa(predictions, targets):
    """MMSA's formulas, written with scikit-learn and numpy."""
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = np.float32(predictions), np.float32(targets)
    keep = y != 0

    def accuracy(limit):
        classes = [np.round(np.clip(values, -limit, limit)) for values in (p, y)]
        return sklearn.accuracy_score(classes[1], classes[0])

    def f1(true, predicted):
        return sklearn.f1_score(true, predicted, average="weighted")

    return {
        "acc7": accuracy(3),
        "acc5": accuracy(2),
        "acc2_has0": sklearn.accuracy_score(y >= 0, p >= 0),
        "acc2_non0": sklearn.accuracy_score(y[keep] > 0, p[keep] > 0),
        "f1_has0": f1(y >= 0, p >= 0),
        "f1_non0": f1(y[keep] > 0, p[keep] > 0),
        "mae": sklearn.mean_absolute_error(y, p),
    }


halves = st.integers(-8, 8).map(lambda n: n / 2)  # every border and every zero
scores = halves | st.floats(-4, 4, width=32)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=40))
def test_same_as_scikit_learn(pairs):
    predictions, targets = zip(*pairs, strict=True)
    assume(any(targets))
    metrics = msa_metrics(predictions, targets)
    for key, value in mmsa(predictions, targets).items():
        assert metrics[key] == pytest.approx(value, abs=1e-6), key


@given(st.lists(st.tuples(halves, halves), min_size=2, max_size=40))
def test_correlation_is_that_of_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    predictions, targets = zip(*pairs, strict=True)
    corr = msa_metrics(predictions, targets)["corr"]
    if len(set(predictions)) == 1 or len(set(targets)) == 1:
        assert math.isnan(corr)
    else:
        assert corr == pytest.approx(stats.pearsonr(predictions, targets).statistic, abs=1e-9)


def test_negative_zero_counts_as_zero():
    assert msa_metrics([-0.0, 1.0], [0.0, 1.0]) == msa_metrics([0.0, 1.0], [0.0, 1.0])


def test_all_targets_zero_leave_nothing_to_tell_negative_from_positive():
    metrics = msa_metrics([0.3, -0.3], [0.0, 0.0])
    assert math.isnan(metrics["acc2_non0"])
    assert math.isnan(metrics["f1_non0"])
    assert metrics["acc2_has0"] == 0.5


def test_values_are_python_floats_and_not_rounded():
    metrics = msa_metrics(np.float32([0.1, 0.2, 1.0]), np.float32([0.4, 0.2, 2.0]))
    assert all(type(value) is float for value in metrics.values())
    assert metrics["acc7"] == 2 / 3


def test_correlation_of_large_and_of_tiny_numbers():
    y = [-1.0, 0.0, 2.0]
    assert msa_metrics([-1e38, 0.0, 2e38], y)["corr"] == pytest.approx(1)
    assert msa_metrics([1e-38, 0.0, -2e-38], y)["corr"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([[1.0]], [1.0], r"predictions: expected shape \(N,\) with N > 0, got \(1, 1\)"),
        ([1.0], [[1.0]], r"targets: expected shape \(N,\) with N > 0, got \(1, 1\)"),
        ([], [], r"predictions: expected shape \(N,\) with N > 0, got \(0,\)"),
        ([1.0, 2.0], [1.0], r"predictions: expected shape \(1,\), got \(2,\)"),
        ([np.nan, 1.0], [1.0, 1.0], "predictions: expected finite numbers, got 1 NaN"),
        ([1.0, 1.0], [np.inf, np.nan], "targets: expected finite numbers, got 2 NaN"),
        ([1e39], [1.0], "predictions: expected finite numbers, got 1 NaN"),
        (["1"], [1.0], "predictions: expected numbers, got dtype <U1"),
    ],
    ids=["column", "column target", "empty", "lengths", "nan", "inf", "float32", "text"],
)
def test_wrong_arguments_are_refused(predictions, targets, message):
    with pytest.raises(ValueError, match=message):
        msa_metrics(predictions, targets)
