"""Is one system better than another on a fold? The paired bootstrap.

Utterances are drawn with replacement, as many as the fold has, and the same ones for both systems: what makes an
utterance hard for both then cancels in the difference. What is compared is the mean of a metric over the seeds of each
system. Two kinds of interval:

- utterances drawn: how the difference between *these trained models* would move on other utterances;
- seeds drawn as well (`over_seeds=True`): how it would move with other seeds too, which is the question "is the method
  better". With two or three seeds that is rough: too wide where seeds hardly matter, too narrow where they matter much.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["METRICS", "Comparison", "paired_bootstrap"]

METRICS = ("acc7", "acc5", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr")
RESAMPLES = 10_000
CHUNK = 500  # resamples that are held at a time: 500 x 4659 counts are 19 MB


@dataclass(frozen=True)
class Comparison:
    """A difference between two systems: the metric of the first minus that of the second."""

    difference: float
    low: float  # ends of the percentile interval
    high: float
    p: float  # two-sided: how often a difference of the other sign is drawn, twice


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    targets: ArrayLike,
    *,
    metric: str = "mae",
    over_seeds: bool = False,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two systems on the same utterances.

    Args:
        first: Predicted scores, shape `(S, N)`: a row per seed; or `(N,)`.
        second: The same of the other system, which may have another number of seeds.
        targets: True scores, shape `(N,)`.
        metric: One of those of `msa_metrics`.
        over_seeds: Draw the seeds of each system as well.
        resamples: How often to draw.
        confidence: Share that the interval is to cover.
        seed: The same seed gives the same draws.

    Returns:
        The difference and its interval. All NaN where the metric of a system is undefined, as a correlation with
        constant predictions is; resamples in which it is undefined are left out.

    Raises:
        ValueError: If shapes differ, a number is not finite, or an argument is out of range.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    true = _finite("targets", targets, ndim=1)
    tallies = []
    for name, scores in (("first", first), ("second", second)):
        scores = np.asarray(scores)
        rows = _finite(name, scores[None] if scores.ndim == 1 else scores, ndim=2)
        if rows.shape[1] != len(true):
            raise ValueError(f"{name}: expected a score for each of {len(true)} targets, got {rows.shape[1]}")
        tallies.append(_tallies(metric, rows, true))

    observed = [float(_value(metric, system.sum(axis=1)).mean()) for system in tallies]
    difference = observed[0] - observed[1]
    if np.isnan(difference):
        return Comparison(*[float("nan")] * 4)

    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [
            _draw(rng, metric, tallies, min(CHUNK, resamples - start), over_seeds=over_seeds)
            for start in range(0, resamples, CHUNK)
        ]
    )
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) == 0:
        return Comparison(difference, *[float("nan")] * 3)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Counting what was observed as one more draw: a p of 0 would claim more than any number of draws can show.
    rarer = min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1
    return Comparison(difference, float(low), float(high), min(1.0, 2 * float(rarer) / (len(drawn) + 1)))


def _draw(
    rng: np.random.Generator, metric: str, tallies: list[np.ndarray], size: int, *, over_seeds: bool
) -> np.ndarray:
    """Differences of the two systems in `size` resamples, (size,)."""
    n = tallies[0].shape[1]
    places = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    counts = np.bincount(places.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
    means = []
    for system in tallies:
        seeds, _, width = system.shape
        sums = counts @ system.transpose(1, 0, 2).reshape(n, seeds * width)
        values = _value(metric, sums.reshape(size, seeds, width))  # (size, seeds)
        if over_seeds:
            values = np.take_along_axis(values, rng.integers(seeds, size=(size, seeds)), axis=1)
        means.append(values.mean(axis=1))
    return means[0] - means[1]


# Every metric is a formula of sums over utterances, so a resample is a weighting of the rows of a matrix.


def _tallies(metric: str, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What the metric sums over utterances: scores (S, N) and targets (N,) to (S, N, K)."""
    targets = np.broadcast_to(targets, scores.shape)
    one = np.ones_like(scores)
    if metric == "mae":
        columns = [np.abs(scores - targets), one]
    elif metric in ("acc7", "acc5"):
        limit = 3 if metric == "acc7" else 2
        classes = [np.round(np.clip(values, -limit, limit)) for values in (scores, targets)]
        columns = [classes[0] == classes[1], one]
    elif metric == "corr":
        x, y = scores - scores.mean(axis=1, keepdims=True), targets - targets.mean(axis=1, keepdims=True)
        columns = [x, y, x * x, y * y, x * y, one]
    else:
        has0 = metric.endswith("has0")
        counted = one if has0 else (targets != 0).astype(np.float64)
        said, is_so = (scores >= 0, targets >= 0) if has0 else (scores > 0, targets > 0)
        if metric.startswith("acc2"):
            columns = [counted * (said == is_so), counted]
        else:
            columns = [counted * (said & is_so), counted * (~said & ~is_so), counted * said, counted * is_so, counted]
    return np.stack(columns, axis=2).astype(np.float64)


def _value(metric: str, sums: np.ndarray) -> np.ndarray:
    """The metric from its sums, (..., K) to (...)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric == "corr":
            x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
            spread = (xx - x * x / n) * (yy - y * y / n)
            # A variance that is nothing but rounding is none: the correlation is undefined, as in msa_metrics.
            constant = (xx - x * x / n <= 1e-12 * xx) | (yy - y * y / n <= 1e-12 * yy)
            return np.where(constant, np.nan, (xy - x * y / n) / np.sqrt(np.where(constant, 1.0, spread)))
        if metric.startswith("f1"):
            hits1, hits0, said1, true1, n = np.moveaxis(sums, -1, 0)
            said0, true0 = n - said1, n - true1
            f1 = [
                np.where(true > 0, 2 * hits / (said + true) * true / n, 0.0)  # weighted by how often it is true
                for hits, said, true in ((hits1, said1, true1), (hits0, said0, true0))
            ]
            return np.where(n > 0, f1[0] + f1[1], np.nan)
        return sums[..., 0] / sums[..., 1]


def _finite(name: str, values: ArrayLike, *, ndim: int) -> np.ndarray:
    """As finite numbers, through float32 like `msa_metrics`."""
    array = np.asarray(values)
    if array.ndim != ndim or array.size == 0:
        expected = "(N,)" if ndim == 1 else "(S, N) or (N,)"
        raise ValueError(f"{name}: expected shape {expected}, not empty, got {array.shape}")
    array = array.astype(np.float32).astype(np.float64)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{name}: expected finite numbers, got {bad} NaN or infinite of {array.size}")
    return array
