"""Features as the model reads them: shifted and scaled by what the training fold measures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mtmd.data.fold import DataError, Fold

CHUNK = 256  # samples that are held in float64 at a time


@dataclass(frozen=True)
class Standardizer:
    """Shifts and scales each feature by its mean and standard deviation over the training fold.

    What counts are the valid time steps of the samples that have the modality, and of those the
    finite values. A feature that is constant there is shifted only; nothing is clipped.
    """

    mean: dict[str, np.ndarray] = field(default_factory=dict)  # {modality: (d,) float64}
    std: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def fit(cls, fold: Fold) -> "Standardizer":
        """Measure mean and (population) standard deviation in `fold`, in float64."""
        mean, std = {}, {}
        for name, array in fold.features.items():
            mean[name], std[name] = _moments(array, fold.lengths[name])
        return cls(mean, std)

    def apply(self, fold: Fold) -> Fold:
        """Return `fold` with standardised features; padding and what is not finite become 0."""
        features = {}
        for name, array in fold.features.items():
            if name not in self.mean or array.shape[2] != len(self.mean[name]):
                known = {key: len(mean) for key, mean in self.mean.items()}
                raise DataError(f"{name}: expected features as in training, {known}, got width {array.shape[2]}")
            features[name] = np.zeros(array.shape, np.float32)
            for rows, values, valid in _valid_chunks(array, fold.lengths[name]):
                with np.errstate(over="ignore"):
                    scaled = ((values - self.mean[name]) / self.std[name]).astype(np.float32)
                features[name][rows] = np.where(valid & np.isfinite(scaled), scaled, 0)
        return replace(fold, features=features)

    def state(self) -> dict[str, np.ndarray]:
        """Return `{"audio.mean": (d,), "audio.std": (d,), ...}`, to be stored with the model."""
        return {
            f"{name}.{kind}": values
            for kind, arrays in (("mean", self.mean), ("std", self.std))
            for name, values in arrays.items()
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "Standardizer":
        """Undo `state`."""
        mean, std = {}, {}
        for key, values in state.items():
            name, _, kind = key.rpartition(".")
            if kind not in ("mean", "std") or not name:
                raise DataError(f"state: expected keys like 'audio.mean', 'audio.std', got {key!r}")
            array = np.asarray(values)
            if array.dtype.kind != "f" or array.ndim != 1 or not np.isfinite(array).all():
                raise DataError(f"state: {key}: expected (d,) finite numbers, got others")
            if kind == "std" and not (array > 0).all():
                raise DataError(f"state: {key}: expected numbers above 0, got others")
            (mean if kind == "mean" else std)[name] = array.astype(np.float64)
        if {name: array.shape for name, array in mean.items()} != {name: array.shape for name, array in std.items()}:
            raise DataError("state: expected a mean and a std of equal shape for each modality")
        return cls(mean, std)


def _moments(array: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, by two passes over the valid finite values."""
    width = array.shape[2]
    count, total, squares = np.zeros(width), np.zeros(width), np.zeros(width)
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for _, values, valid in _valid_chunks(array, lengths):
        count += valid.sum(axis=(0, 1))
        total += values.sum(axis=(0, 1), where=valid)
        low = np.minimum(low, values.min(axis=(0, 1), where=valid, initial=np.inf))
        high = np.maximum(high, values.max(axis=(0, 1), where=valid, initial=-np.inf))
    mean = total / np.maximum(count, 1)
    for _, values, valid in _valid_chunks(array, lengths):
        squares += np.square(values - mean).sum(axis=(0, 1), where=valid)
    std = np.sqrt(squares / np.maximum(count, 1))
    return mean, np.where(low < high, std, 1.0)


def _valid_chunks(array: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Slices of samples, with their values in float64 and a mask of those that count."""
    for start in range(0, len(array), CHUNK):
        rows = slice(start, start + CHUNK)
        values = array[rows].astype(np.float64)
        inside = np.arange(array.shape[1]) < lengths[rows, None]  # (rows, T)
        valid = inside[:, :, None] & np.isfinite(values)
        yield rows, np.where(valid, values, 0), valid
