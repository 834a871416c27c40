"""A made-up sentiment dataset with a known answer, in the layout of MMSA's unaligned pickles.

What each modality can know is set exactly. A sample's opinion z is a standard normal number, the
sum of independent parts, and its score is 3.3 tanh(0.6 z), cut to [-3, 3], in steps of 0.2: like
MOSI's, with about 4 % neutral. Lay the parts out on a line of length 1, so that a stretch of it is
a share of the variance of z. A modality reads the parts on one stretch, as long as its signal:

    0       0.2       0.4       0.6       0.8         1
    |---------|---------|---------|---------|---------|
      [============== text 0.8 ==============]
                                   [= vision 0.35 =]
                                [==== audio 0.45 ====]

So the best guess of z from one modality explains the share `signal` of its variance. Where
stretches overlap, modalities know the same; where one is alone, it knows what no other can tell.

What is read is scattered over time. Some steps carry it and say so by a cue in other features; the
remaining steps show a random number in its place. On top lie a slow drift and noise. A mean over
time gets it blurred; a sequence encoder that learns the cue gets nearly all of it.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtmd.data.fold import FOLDS, Dataset
from mtmd.data.mmsa import from_mmsa

__all__ = ["make_synthetic", "synthetic_dataset"]

# A stretch of length s begins at place * (1 - s), so that it fits whatever s is. By default text
# leaves 0.15 to audio and vision, and 0.05 at the left end to nobody.
PLACES = {"text": 0.25, "audio": 1.0, "vision": 0.95}
WIDTHS = {"text": 32, "audio": 12, "vision": 16}
STEPS = {"text": 20, "audio": 30, "vision": 30}

# The same reading in words, from negative to positive; other steps get a word that says nothing.
OPINIONS = ["awful", "bad", "weak", "plain", "decent", "good", "superb"]
OPINION_BORDERS = [-1.5, -0.9, -0.3, 0.3, 0.9, 1.5]
FILLERS = ["the", "a", "movie", "scene", "actor", "and", "in", "it", "this", "was", "with", "story"]


def make_synthetic(
    *,
    seed: int = 0,
    sizes: tuple[int, int, int] = (600, 150, 300),
    signal: Mapping[str, float] | None = None,
    missing: Mapping[str, float] | None = None,
    wrong: Mapping[str, float] | None = None,
    noise: float = 0.5,
) -> dict[str, dict[str, Any]]:
    """Make the three folds.

    Args:
        seed: The same seed and arguments give the same data, to the bit.
        sizes: Samples in train, valid and test.
        signal: Share of the variance of the opinion that each modality can explain, in [0, 1]. At 0
            a modality looks the same and knows nothing. Modalities that are not named keep their
            default: text 0.8, audio 0.45, vision 0.35.
        missing: Share of samples without that modality: length 0, all zeros. By default audio 0.05
            and vision 0.15; text is never missing.
        wrong: Share of samples whose reading in that modality is of nothing: as clear as any other,
            and drawn at random, like the text of a speaker who means something else. By default none.
        noise: Standard deviation of the noise on every feature of every step, where what is read
            has 1.

    Returns:
        `{"train" | "valid" | "test": {key: array}}` with `id`, `raw_text`, `text`, `audio`,
        `vision`, their `*_lengths`, `regression_labels`, `classification_labels`, `annotations`.
        `from_mmsa` reads it, and pickled it is an MMSA file.

    Raises:
        ValueError: If a name is not one of text, audio, vision, or a number is out of range.
    """
    signal = _shares("signal", signal, {"text": 0.8, "audio": 0.45, "vision": 0.35})
    missing = _shares("missing", missing, {"audio": 0.05, "vision": 0.15})
    wrong = _shares("wrong", wrong, dict.fromkeys(WIDTHS, 0.0))
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"sizes: expected three numbers of at least 1, got {sizes}")
    if not 0 <= noise < np.inf:
        raise ValueError(f"noise: expected a number of at least 0, got {noise}")

    rng = np.random.default_rng([seed, 0])
    looks = {name: _Look(rng, width) for name, width in WIDTHS.items()}  # the same in all folds
    content = {}
    for number, (fold, size) in enumerate(zip(FOLDS, sizes, strict=True), start=1):
        rng = np.random.default_rng([seed, number])  # so the size of one fold changes no other
        opinions, readings = _opinions_and_readings(rng, size, signal)
        misled = np.random.default_rng([seed, number, 1])  # of its own: a share of 0 leaves the set as it is
        for name, reading in readings.items():
            chosen = misled.random(size) < wrong[name]
            reading[chosen] = misled.normal(size=size)[chosen]
        scores = np.clip(3.3 * np.tanh(0.6 * opinions), -3, 3)
        scores = np.round(scores * 5) / 5 + 0.0  # + 0.0: no negative zero
        made: dict[str, Any] = {"id": _ids(rng, fold, size)}
        for name, reading in readings.items():
            array, lengths, carries = _sequences(rng, reading, looks[name], STEPS[name], noise)
            gone = rng.random(size) < missing.get(name, 0.0)
            array[gone], lengths[gone] = 0, 0
            made[name], made[f"{name}_lengths"] = array, lengths
            if name == "text":
                made["raw_text"] = _texts(rng, reading, lengths, carries)
        made["regression_labels"] = scores.astype(np.float32)
        made["classification_labels"] = np.sign(scores).astype(np.float32) + 1
        made["annotations"] = np.array(["Negative", "Neutral", "Positive"])[made["classification_labels"].astype(int)]
        content[fold] = made
    return content


def synthetic_dataset(**options: Any) -> Dataset:
    """The same as a `Dataset`; takes the arguments of `make_synthetic`."""
    return from_mmsa(make_synthetic(**options), name="synthetic", source="synthetic data", synthetic=True)


def _shares(argument: str, given: Mapping[str, float] | None, defaults: dict[str, float]) -> dict[str, float]:
    shares = {**defaults, **(given or {})}
    unknown = sorted(set(shares) - set(defaults))
    if unknown:
        raise ValueError(f"{argument}: expected names among {sorted(defaults)}, got {unknown[0]!r}")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{argument}: expected a number in [0, 1] for {name}, got {share}")
    return shares


def _opinions_and_readings(
    rng: np.random.Generator, size: int, signal: Mapping[str, float]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The opinions (n,) and what each modality reads of them (n,), all of variance 1."""
    start = {name: PLACES[name] * (1 - share) for name, share in signal.items()}
    end = {name: start[name] + share for name, share in signal.items()}
    edges = sorted({0.0, 1.0, *start.values(), *(min(1.0, place) for place in end.values())})
    opinions = np.zeros(size)
    readings = {name: np.zeros(size) for name in signal}
    for left, right in itertools.pairwise(edges):
        part = rng.normal(scale=np.sqrt(right - left), size=size)
        opinions += part
        for name in signal:
            if start[name] <= left and right <= end[name]:
                readings[name] += part
    for name, share in signal.items():
        if share > 0:
            readings[name] /= np.sqrt(share)
        else:
            readings[name] = rng.normal(size=size)
    return opinions, readings


class _Look:
    """How one modality shows things: a direction for each in feature space, scales and offsets."""

    def __init__(self, rng: np.random.Generator, width: int) -> None:
        directions, _ = np.linalg.qr(rng.normal(size=(width, 4)))
        self.reading, self.cue, *self.drifts = directions.T * np.sqrt(width / 4)
        self.scale = 10 ** rng.uniform(-1, 1, size=width)
        self.offset = rng.normal(size=width) * self.scale


def _sequences(
    rng: np.random.Generator, reading: np.ndarray, look: _Look, steps: int, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, T, d), lengths (n,), and which steps carry the reading (n, T)."""
    size, width = len(reading), len(look.scale)
    lengths = rng.integers(steps // 4, steps, size=size, endpoint=True)
    inside = np.arange(steps) < lengths[:, None]
    carries = rng.random((size, steps)) < 0.4
    carries[np.arange(size), rng.integers(lengths)] = True  # at least one step does
    carries &= inside

    shown = np.where(carries, reading[:, None], rng.normal(size=(size, steps)))
    array = shown[:, :, None] * look.reading + np.where(carries, 1, -1)[:, :, None] * look.cue
    for direction in look.drifts:
        array += _drift(rng, size, steps)[:, :, None] * direction
    array += noise * rng.normal(size=(size, steps, width))
    array = array * look.scale + look.offset
    array[~inside] = 0
    return array.astype(np.float32), lengths, carries


def _drift(rng: np.random.Generator, size: int, steps: int) -> np.ndarray:
    """A slowly moving nuisance (n, T) of variance 1: what a speaker or a camera adds."""
    drift = np.empty((size, steps))
    drift[:, 0] = rng.normal(size=size)
    for step in range(1, steps):
        drift[:, step] = 0.9 * drift[:, step - 1] + np.sqrt(1 - 0.9**2) * rng.normal(size=size)
    return drift


def _texts(rng: np.random.Generator, reading: np.ndarray, lengths: np.ndarray, carries: np.ndarray) -> list[str]:
    """One word for each step of the text."""
    opinion_words = np.array(OPINIONS)[np.digitize(reading, OPINION_BORDERS)]
    fillers = np.array(FILLERS)[rng.integers(len(FILLERS), size=carries.shape)]
    words = np.where(carries, opinion_words[:, None], fillers)
    return [" ".join(row[:length]) for row, length in zip(words, lengths, strict=True)]


def _ids(rng: np.random.Generator, fold: str, size: int) -> list[str]:
    """VIDEO$_$CLIP, with two to eight clips a video."""
    ids: list[str] = []
    for video in itertools.count():
        for clip in range(rng.integers(2, 8, endpoint=True)):
            if len(ids) == size:
                return ids
            ids.append(f"{fold}{video:04d}$_${clip}")
    raise AssertionError("unreachable")
