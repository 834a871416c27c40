"""Two experiment folders compared by their saved predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtmd.results.bootstrap import RESAMPLES, Comparison, paired_bootstrap
from mtmd.results.records import load_predictions

SIMS_LIMIT = 1.0  # the metrics of CH-SIMS clip to [-1, 1]


@dataclass(frozen=True)
class Scores:
    """One column of a predictions.csv on one fold."""

    ids: list[str]
    targets: np.ndarray  # (N,)
    seeds: list[int]
    scores: np.ndarray  # (S, N); NaN where the sample misses the modality of that branch


def read_scores(
    folder: Path, *, split: str = "test", column: str = "score", seeds: Sequence[int] | None = None
) -> Scores:
    """The predictions of an experiment.

    Args:
        folder: Of the experiment.
        split: "valid" or "test".
        column: "score" (fused) or a modality (its branch alone).
        seeds: Which runs; None: all.

    Raises:
        ValueError: If a seed is not there, or seeds were scored on different utterances.
        OSError: If the file cannot be read.
    """
    path = Path(folder) / "predictions.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the predictions of a finished experiment, got no such file")
    loaded = load_predictions(folder)
    seeds = list(loaded) if seeds is None else list(seeds)
    absent = [seed for seed in seeds if seed not in loaded]
    if absent or not seeds:
        there = ", ".join(map(str, loaded)) or "none"
        raise ValueError(f"{path}: expected predictions of seed {absent[0] if absent else 'any'}, got those of {there}")
    tables = [loaded[seed][split] for seed in seeds]
    ids, targets = tables[0]["id"], tables[0]["target"]
    if not ids:
        raise ValueError(f"{path}: expected predictions on the {split} fold, got none")
    for seed, table in zip(seeds, tables, strict=True):
        if table["id"] != ids or not np.array_equal(table["target"], targets):
            raise ValueError(f"{path}: expected the same utterances for every seed, but seed {seed} has others")
    return Scores(ids, targets, seeds, np.stack([table[column] for table in tables]))


def compare_experiments(
    first: Path,
    second: Path,
    *,
    split: str = "test",
    column: str = "score",
    seeds: Sequence[int] | None = None,
    metric: str = "mae",
    limit: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Comparison, Comparison | None]:
    """`paired_bootstrap` of the predictions in two folders, with the arguments of that and of `read_scores`.

    Of a branch, the utterances count that have its modality. With a limit, scores are clipped to [-limit, limit], as
    those of CH-SIMS are to be.

    Returns:
        The difference first minus second with its interval over utterances, then with the interval over utterances and
        seeds; None for the latter where either has a single seed.

    Raises:
        ValueError: If the two were not scored on the same utterances.
        OSError: If a file cannot be read.
    """
    one, two = (read_scores(folder, split=split, column=column, seeds=seeds) for folder in (first, second))
    if one.ids != two.ids or not np.array_equal(one.targets, two.targets):
        raise ValueError(
            f"{second}: expected predictions for the {split} utterances of {first} ({len(one.ids)} of them), "
            f"got other ones ({len(two.ids)}); compare experiments on the same data"
        )
    there = np.isfinite(one.scores).all(axis=0) & np.isfinite(two.scores).all(axis=0)
    if not there.any():
        raise ValueError(f"{second}: no {split} utterance has a {column!r} prediction in both experiments")
    systems = [one.scores[:, there], two.scores[:, there], one.targets[there]]
    if limit is not None:
        systems = [np.clip(scores, -limit, limit) for scores in systems]
    options: dict[str, Any] = {"metric": metric, "resamples": resamples, "seed": seed}
    several = min(len(one.seeds), len(two.seeds)) > 1  # of one, nobody knows how far another lies from it
    return (
        paired_bootstrap(*systems, **options),
        paired_bootstrap(*systems, over_seeds=True, **options) if several else None,
    )
