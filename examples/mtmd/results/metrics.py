"""The numbers that tables on CMU-MOSI, CMU-MOSEI and CH-SIMS report, computed as MMSA computes them.

For the first two, MMSA's `KeyEval` names them Mult_acc_7, Mult_acc_5, Has0_acc_2, Non0_acc_2, Has0_F1_score,
Non0_F1_score, MAE and Corr, for CH-SIMS Mult_acc_2, Mult_acc_3, Mult_acc_5, F1_score, MAE and Corr. It rounds to
four decimals; here nothing is rounded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["columns_of", "in_percent", "mean_and_std", "metrics_for", "msa_metrics", "number", "sims_metrics"]

# What tables show, in the order of the paper. Two in one are negative/non-negative, then negative/positive.
COLUMNS = {
    "Acc7": ("acc7",),
    "Acc5": ("acc5",),
    "Acc2": ("acc2_has0", "acc2_non0"),
    "F1": ("f1_has0", "f1_non0"),
    "MAE": ("mae",),
    "Corr": ("corr",),
}
SIMS_COLUMNS = {
    "Acc5": ("acc5",),
    "Acc3": ("acc3",),
    "Acc2": ("acc2",),
    "F1": ("f1",),
    "MAE": ("mae",),
    "Corr": ("corr",),
}

NO_SHARES = ("mae", "corr")
SIMS_BORDERS = {2: [0.0], 3: [-0.1, 0.1], 5: [-0.7, -0.1, 0.1, 0.7]}  # between classes; each belongs to the one below


def metrics_for(score_range: tuple[float, float]) -> Callable[[ArrayLike, ArrayLike], dict[str, float]]:
    """`sims_metrics` for scores in [-1, 1], `msa_metrics` for any others."""
    return sims_metrics if tuple(score_range) == (-1, 1) else msa_metrics


def msa_metrics(predictions: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """Compare predicted with true sentiment scores.

    Args:
        predictions: Scores of any range, shape `(N,)`. Only `acc7` and `acc5` clip them.
        targets: True scores, shape `(N,)`.

    Returns:
        - `acc7`, `acc5`: share of equal values after clipping both to [-3, 3] or [-2, 2] and
          rounding half to even, so that 0.5 becomes 0 and 1.5 and 2.5 both become 2.
        - `acc2_has0`, `f1_has0`: negative against non-negative, over all samples.
        - `acc2_non0`, `f1_non0`: negative against positive, over the samples whose target is not 0;
          there a prediction of exactly 0 counts as negative. NaN if every target is 0.
        - `mae`: mean absolute error.
        - `corr`: Pearson correlation. NaN, as in MMSA, if predictions or targets are all the same.

        Accuracies and F1 are fractions. F1 is the mean over both classes, weighted by how often
        each is the true one.

    Raises:
        ValueError: If the two are not of the same shape `(N,)` with N > 0, or not finite.
    """
    predictions = _scores("predictions", predictions)
    targets = _scores("targets", targets)
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions: expected shape {targets.shape}, got {predictions.shape}")

    non0 = targets != 0
    has0_classes = predictions >= 0, targets >= 0
    non0_classes = predictions[non0] > 0, targets[non0] > 0
    return {
        "acc7": _accuracy(_to_classes(predictions, 3), _to_classes(targets, 3)),
        "acc5": _accuracy(_to_classes(predictions, 2), _to_classes(targets, 2)),
        "acc2_has0": _accuracy(*has0_classes),
        "acc2_non0": _accuracy(*non0_classes),
        "f1_has0": _weighted_f1(*has0_classes),
        "f1_non0": _weighted_f1(*non0_classes),
        "mae": float(np.abs(predictions - targets).mean()),
        "corr": _correlation(predictions, targets),
    }


def sims_metrics(predictions: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """Compare predicted with true scores in [-1, 1], as MMSA does for CH-SIMS.

    Both are clipped to that range first, for all metrics. Mind that 0 is negative here.

    Args:
        predictions: Scores of any range, shape `(N,)`.
        targets: True scores, shape `(N,)`.

    Returns:
        - `acc2`, `acc3`, `acc5`: share of samples whose class is right, with the borders 0; ±0.1; ±0.1
          and ±0.7. A score on a border belongs to the class below.
        - `f1`: of the two classes of `acc2`, weighted by how often each is the true one.
        - `mae`: mean absolute error.
        - `corr`: Pearson correlation. NaN, as in MMSA, if predictions or targets are all the same.

        Accuracies and F1 are fractions.

    Raises:
        ValueError: As `msa_metrics`.
    """
    predictions = np.clip(_scores("predictions", predictions), -1, 1)
    targets = np.clip(_scores("targets", targets), -1, 1)
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions: expected shape {targets.shape}, got {predictions.shape}")
    # The borders are float32 too, as in MMSA, so that a label of 0.1 lies on one.
    classes = {
        count: [np.digitize(values, np.float32(borders), right=True) for values in (predictions, targets)]
        for count, borders in SIMS_BORDERS.items()
    }
    return {
        **{f"acc{count}": _accuracy(*pair) for count, pair in classes.items()},
        "f1": _weighted_f1(*(values.astype(bool) for values in classes[2])),
        "mae": float(np.abs(predictions - targets).mean()),
        "corr": _correlation(predictions, targets),
    }


def columns_of(metrics: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The columns of a table of these metrics: heading and names."""
    return SIMS_COLUMNS if "acc3" in metrics else COLUMNS


def mean_and_std(found: Sequence[Mapping[str, float | None]]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Of each metric over several runs or draws, NaN where one has none; sample deviation, None for a single one."""
    values = {name: np.array([metrics[name] for metrics in found], np.float64) for name in found[0]}
    mean = {name: float(of.mean()) for name, of in values.items()}
    return mean, {name: float(of.std(ddof=1)) if len(of) > 1 else None for name, of in values.items()}


def in_percent(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Accuracies and F1 in percent, as tables have them."""
    return {name: value if name in NO_SHARES or value is None else 100 * value for name, value in metrics.items()}


def number(metric: str, value: float | None) -> str:
    """One decimal for percent, three for MAE and Corr; a dash where there is none."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:.3f}" if metric in NO_SHARES else f"{value:.1f}"


def _scores(name: str, values: ArrayLike) -> np.ndarray:
    scores = np.asarray(values)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name}: expected shape (N,) with N > 0, got {scores.shape}")
    if scores.dtype.kind not in "iuf":
        raise ValueError(f"{name}: expected numbers, got dtype {scores.dtype}")
    # Through float32, like MMSA: this decides on which side of a class border a float64 falls.
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32).astype(np.float64)
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise ValueError(f"{name}: expected finite numbers, got {bad} NaN or infinite of {len(scores)}")
    return scores


def _to_classes(scores: np.ndarray, limit: int) -> np.ndarray:
    return np.round(np.clip(scores, -limit, limit))


def _accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float((predicted == true).mean()) if len(true) else float("nan")


def _weighted_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    if len(true) == 0:
        return float("nan")
    total = 0.0
    for label in (False, True):
        support = (true == label).sum()
        if support:
            hits = ((predicted == label) & (true == label)).sum()
            f1 = 2 * hits / ((predicted == label).sum() + support)
            total += f1 * support / len(true)
    return float(total)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if x.min() == x.max() or y.min() == y.max():
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # no square below can over- or underflow
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))
