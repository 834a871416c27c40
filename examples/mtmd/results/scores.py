"""What a model says about a fold, and how good that is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtmd.data.batches import batches
from mtmd.data.fold import Fold, presence
from mtmd.model import MTMD

Metrics = dict[str, float]
Measure = Callable[[np.ndarray, np.ndarray], Metrics]  # of scores and targets; must give "mae"


@dataclass(frozen=True)
class Said:
    """What a model says about the n samples of a fold, in its order."""

    scores: np.ndarray  # (n,) float32, of the fused prediction
    probabilities: np.ndarray  # (n, 3)
    representations: np.ndarray  # (n, d_f) float32, fused
    branch_scores: dict[str, np.ndarray]  # by modality (n,) float32, NaN where a sample misses it
    features: dict[str, Tensor]  # by modality (n, d), what the fusion reads
    present: dict[str, np.ndarray]  # by modality (n,) bool


@torch.no_grad()
def score_fold(model: MTMD, fold: Fold, batch_size: int, device: torch.device) -> Said:
    """What a model says about a fold that is as it reads it."""
    model.eval()
    # Not what --compile made: a checkpoint has to give the same numbers.
    outputs = [model.forward(batch) for batch in batches(fold, batch_size, device=device)]
    there = presence(fold)

    def joined(tensors: Iterable[Tensor]) -> np.ndarray:
        return torch.cat(list(tensors)).float().cpu().numpy()

    branches = {name: [one.unimodal[name] for one in outputs] for name in model.modalities}
    scores = {name: joined(one.scores for one in said) for name, said in branches.items()}
    return Said(
        scores=joined(one.fused.scores for one in outputs),
        probabilities=joined(one.fused.logits.float().softmax(dim=1) for one in outputs),
        representations=joined(one.fused.features for one in outputs),
        branch_scores={name: np.where(there[name], said, np.float32("nan")) for name, said in scores.items()},
        features={name: torch.cat([one.features for one in said]) for name, said in branches.items()},
        present={name: there[name] for name in model.modalities},
    )


def check_finite(said: Said, where: str) -> None:
    """Raise unless every prediction is finite that should be one: a branch has none where its modality is missing."""
    if not np.isfinite(said.scores).all():
        raise FloatingPointError(f"{where}: a prediction is NaN or infinite")
    for name, values in said.branch_scores.items():
        if not np.isfinite(values[said.present[name]]).all():
            raise FloatingPointError(f"{where}: a prediction of the {name} branch is NaN or infinite")


def unimodal_metrics(said: Said, fold: Fold, metrics: Measure) -> dict[str, Metrics]:
    """Metrics of each branch over the samples that have its modality; a branch that no sample has is left out."""
    return {
        name: metrics(said.branch_scores[name][there], fold.scores[there])
        for name, there in said.present.items()
        if there.any()
    }
