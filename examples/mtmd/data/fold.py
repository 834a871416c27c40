"""Samples in memory: a fold of them, a data set of three folds, and which sample has which modality."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mtmd.settings.config import MODALITIES

FOLDS = ("train", "valid", "test")
CLASSES = ("negative", "neutral", "positive")
ABSENT = -1  # the label of a row or key that is not there
MOSI_RANGE = (-3.0, 3.0)  # of the scores of CMU-MOSI and CMU-MOSEI
SIMS_RANGE = (-1.0, 1.0)  # of the scores of CH-SIMS
FORMS = {name: (name,) for name in MODALITIES} | {"text": ("text", "text_bert", "raw_text")}  # keys of a modality
KEYS = tuple(key for forms in FORMS.values() for key in forms)
UNIMODAL_LABELS = {"text": "regression_labels_T", "audio": "regression_labels_A", "vision": "regression_labels_V"}
AXES = {"id": 1, "regression_labels": 1, "raw_text": 1, "text_bert": 3} | dict.fromkeys(MODALITIES, 3)
AXES |= dict.fromkeys([*UNIMODAL_LABELS.values(), *(f"{name}_lengths" for name in MODALITIES)], 1)
NOT_READ = {"annotations", "classification_labels", *(f"classification_labels_{one}" for one in "TAV")}


class DataError(ValueError):
    """The data is not what this example reads; the message names fold, key, found and expected."""


@dataclass(frozen=True)
class Fold:
    """The n samples of one fold, in the order of the file."""

    ids: list[str]
    scores: np.ndarray  # (n,) float32
    raw_text: list[str] | None
    text_bert: np.ndarray | None  # (n, 3, L) int64: token ids, attention mask, segment ids
    features: dict[str, np.ndarray]  # "audio", "vision", maybe "text": (n, T, d) float32
    lengths: dict[str, np.ndarray]  # the same keys: (n,) int64, 0 = missing
    unimodal_scores: dict[str, np.ndarray] = field(default_factory=dict)  # CH-SIMS: (n,) float32 by modality
    unread: tuple[Any, ...] = ()  # what else its file has

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def filled(self) -> dict[str, np.ndarray]:
        """By each of `KEYS` that is there, which samples have something in it, (n,) bool."""
        filled = {name: self.lengths[name] > 0 for name in self.features}
        if self.text_bert is not None:
            filled["text_bert"] = self.text_bert[:, 1].any(axis=1)
        if self.raw_text is not None:
            filled["raw_text"] = np.array([bool(text.strip()) for text in self.raw_text])
        return {key: filled[key] for key in KEYS if key in filled}


@dataclass(frozen=True)
class Dataset:
    """Three folds and what is worth knowing about them."""

    name: str
    synthetic: bool
    folds: dict[str, Fold]  # "train", "valid", "test"
    notes: list[str]  # what a reader of results should know: one line each
    fingerprint: str  # SHA-256 of the file, or of the arrays where there was no file
    score_range: tuple[float, float] = MOSI_RANGE  # between which scores lie; 0 is neutral
    classes: tuple[str, ...] = CLASSES  # what to call scores below, at and above 0

    @property
    def widths(self) -> dict[str, int]:
        """Feature width d of each modality that has features."""
        return {name: array.shape[2] for name, array in self.folds["train"].features.items()}


def class_labels(scores: np.ndarray) -> np.ndarray:
    """0 negative, 1 neutral, 2 positive: the sign of each score, as int64 of the same shape."""
    return np.sign(scores).astype(np.int64) + 1


def presence(fold: Fold) -> dict[str, np.ndarray]:
    """Which samples have which modality, (n,) bool; text is there as features or as tokens."""
    return presence_of(fold.lengths, fold.text_bert)


def presence_of(lengths: Mapping[str, np.ndarray], tokens: np.ndarray | None) -> dict[str, np.ndarray]:
    present = {name: length > 0 for name, length in lengths.items()}
    if tokens is not None:
        attended = tokens[:, 1].any(axis=1)
        present["text"] = present["text"] | attended if "text" in present else attended
    return present


def one_text(fold: Fold, *, tokens: bool) -> Fold:
    """The fold with its text as tokens or as features alone: the form that is read says where text is missing."""
    if not tokens:
        return replace(fold, text_bert=None)

    def without_text(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array for name, array in arrays.items() if name != "text"}

    return replace(fold, features=without_text(fold.features), lengths=without_text(fold.lengths))


def drop_modalities(fold: Fold, rates: Mapping[str, float], seed: int) -> Fold:
    """Take modalities away from samples chosen at random: length 0, no tokens, an empty raw text.

    Each sample loses each modality with that probability, independently, and may lose them all. The
    same seed chooses the same samples; a higher rate takes more beside them, and the rate of one
    modality has no influence on the others. The features stay where they are, shared with `fold`:
    at length 0 nobody reads them.

    Args:
        fold: With raw text, before or after it was turned into tokens.
        rates: Probability by name of the modality; one that is not named is kept.
        seed: At least 0.

    Raises:
        ValueError: If a rate is not in [0, 1], or above 0 for a modality that the fold does not have.
    """
    there = [*fold.features]
    if "text" not in there and (fold.text_bert is not None or fold.raw_text is not None):
        there.insert(0, "text")
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"rates: expected a number in [0, 1] for {name}, got {rate}")
        if rate > 0 and name not in there:
            raise ValueError(f"rates: expected modalities of the data ({', '.join(there)}), got {name!r}")
    lengths, text_bert, raw_text = dict(fold.lengths), fold.text_bert, fold.raw_text
    for number, name in enumerate(MODALITIES):
        if not rates.get(name):
            continue
        gone = np.random.default_rng([seed, number]).random(len(fold)) < rates[name]
        if name in lengths:
            lengths[name] = np.where(gone, 0, lengths[name])
        if name == "text" and text_bert is not None:
            text_bert = np.where(gone[:, None, None], 0, text_bert)
        if name == "text" and raw_text is not None:
            raw_text = ["" if empty else text for text, empty in zip(raw_text, gone, strict=True)]
    return replace(fold, lengths=lengths, text_bert=text_bert, raw_text=raw_text)


def data_sha256(folds: Mapping[str, Fold], *, labels: bool = False) -> str:
    """SHA-256 of what is trained on; with `labels`, of words and the labels of single modalities as well."""
    digest = hashlib.sha256()
    for name, fold in folds.items():
        arrays = {"scores": fold.scores, "text_bert": fold.text_bert, **fold.features}
        arrays |= {f"{key}_lengths": length for key, length in fold.lengths.items()}
        if labels:
            arrays |= {UNIMODAL_LABELS[key]: values for key, values in fold.unimodal_scores.items()}
        texts = (name, fold.ids, fold.raw_text) if labels else (name, fold.ids)
        digest.update(repr(texts).encode(errors="backslashreplace"))
        for key, array in arrays.items():
            if array is not None:
                digest.update(repr((key, array.shape, array.dtype.str)).encode())
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
