"""What a model says about a fold, and how good that is."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from mtmd.data.batches import batches
from mtmd.data.fold import Fold, presence
from mtmd.model import MTMD

Metrics = dict[str, float]
Measure = Callable[[np.ndarray, np.ndarray], Metrics]  # of scores and targets; must give "mae"


class Scores(NamedTuple):
    """What a model says about a fold of n samples, in its order."""

    fused: np.ndarray  # (n,) float32
    unimodal: dict[str, np.ndarray]  # by modality (n,) float32, NaN where a sample misses it
    features: np.ndarray  # fused representations, (n, d_f) float32


@torch.no_grad()
def score_fold(model: MTMD, fold: Fold, batch_size: int, device: torch.device) -> Scores:
    """Scores of a fold by the fusion and by each branch."""
    model.eval()
    fused, features, unimodal = [], [], {}
    for batch in batches(fold, batch_size, device=device):
        outputs = model.forward(batch)  # not what --compile made: a checkpoint has to give the same numbers
        fused.append(outputs.fused.scores.float().cpu())
        features.append(outputs.fused.features.float().cpu())
        for name, prediction in outputs.unimodal.items():
            scores = torch.where(batch.present[name], prediction.scores.float(), math.nan)
            unimodal.setdefault(name, []).append(scores.cpu())
    return Scores(
        torch.cat(fused).numpy(),
        {name: torch.cat(parts).numpy() for name, parts in unimodal.items()},
        torch.cat(features).numpy(),
    )


def check_finite(scores: Scores, fold: Fold, where: str) -> None:
    """Raise unless every prediction is finite that should be one: a branch has none where its modality is missing."""
    if not np.isfinite(scores.fused).all():
        raise FloatingPointError(f"{where}: a prediction is NaN or infinite")
    there = presence(fold)
    for name, values in scores.unimodal.items():
        if not np.isfinite(values[there[name]]).all():
            raise FloatingPointError(f"{where}: a prediction of the {name} branch is NaN or infinite")


def unimodal_metrics(scores: Scores, fold: Fold, metrics: Measure) -> dict[str, Metrics]:
    """Metrics of each branch over the samples that have its modality; a branch that no sample has is left out."""
    result = {}
    for name, values in scores.unimodal.items():
        there = ~np.isnan(values)
        if there.any():
            result[name] = metrics(values[there], fold.scores[there])
    return result
