"""Samples as tensors, some at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtmd.data.fold import ABSENT, Fold, class_labels, presence_of


@dataclass(frozen=True)
class Batch:
    """N samples as tensors, cut to the longest of them."""

    index: Tensor  # (N,) int64: rows in the fold
    scores: Tensor  # (N,) float32
    labels: Tensor  # (N,) int64: see class_labels
    tokens: Tensor | None  # (N, 3, L) int64
    features: dict[str, Tensor]  # (N, T, d) float32
    lengths: dict[str, Tensor]  # (N,) int64, 0 = missing
    present: dict[str, Tensor]  # (N,) bool; has "text" also where the text is tokens alone
    total: int  # N, or with several processes the rows that all of them have of this batch

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return Batch(
            index=self.index.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
            tokens=None if self.tokens is None else self.tokens.to(device),
            features=move(self.features),
            lengths=move(self.lengths),
            present=move(self.present),
            total=self.total,
        )


def batches(
    fold: Fold,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    place: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Go once through `fold`: shuffled if a generator is given, in order if not.

    The last batch may be smaller. Sequences and token columns are cut to the longest of the batch,
    but never to less than one step. Of several processes `place` says which one this is, and of how many: it gets its
    share of each batch. Where there is none left for it, it gets a row in which everything is marked absent, for the
    encoders know no empty batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    order = np.arange(len(fold)) if generator is None else torch.randperm(len(fold), generator=generator).numpy()
    starts = range(0, len(fold), batch_size)
    return (_share(fold, order[start : start + batch_size], *place).to(device) for start in starts)


def _share(fold: Fold, rows: np.ndarray, rank: int, processes: int) -> Batch:
    """The rows of a batch that are this process's."""
    own = np.array_split(rows, processes)[rank]
    if len(own):
        return _make_batch(fold, own, len(rows))
    batch = _make_batch(fold, rows[:1], len(rows))
    for absent in (batch.index, batch.labels):
        absent.fill_(ABSENT)
    for there in batch.present.values():
        there.fill_(False)
    return batch


def _make_batch(fold: Fold, rows: np.ndarray, total: int) -> Batch:
    features = {}
    lengths = {name: length[rows] for name, length in fold.lengths.items()}
    for name, array in fold.features.items():
        longest = max(1, int(lengths[name].max()))
        values = array[rows, :longest]  # a copy
        values[lengths[name] == 0] = 0  # what is missing is nothing, whatever the fold holds there
        features[name] = torch.from_numpy(values)
    tokens = None
    if fold.text_bert is not None:
        tokens = fold.text_bert[rows]  # (N, 3, L)
        used = np.flatnonzero(tokens[:, 1].any(axis=0))
        tokens = tokens[:, :, : int(used[-1]) + 1 if len(used) else 1]
    scores = fold.scores[rows]
    return Batch(
        index=torch.from_numpy(rows.astype(np.int64)),
        scores=torch.from_numpy(scores),
        labels=torch.from_numpy(class_labels(scores)),
        tokens=None if tokens is None else torch.from_numpy(np.ascontiguousarray(tokens)),
        features=features,
        lengths={name: torch.from_numpy(length) for name, length in lengths.items()},
        present={name: torch.from_numpy(there) for name, there in presence_of(lengths, tokens).items()},
        total=total,
    )
