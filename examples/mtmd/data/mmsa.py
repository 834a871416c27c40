"""Multimodal sentiment data: MMSA's pickles as they are found, checked, standardised and batched.

CMU-MOSI, CMU-MOSEI and CH-SIMS, aligned and unaligned. Data of another kind comes in by own_format.py.

    dataset = load_mmsa("mosi.pkl", name="mosi")
    standardizer = Standardizer.fit(dataset.folds["train"])
    train = standardizer.apply(dataset.folds["train"])
    for batch in batches(train, 64, generator=torch.Generator().manual_seed(0)):
        ...

Nothing is repaired in silence: what is unusual about a file is counted and told in `Dataset.notes`.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mtmd.data.fold import (
    AXES,
    CLASSES,
    FOLDS,
    KEYS,
    MODALITIES,
    MOSI_RANGE,
    NOT_READ,
    SIMS_RANGE,
    UNIMODAL_LABELS,
    DataError,
    Dataset,
    Fold,
    data_sha256,
)
from mtmd.data.values import (
    axes,
    count_samples,
    key_names,
    lengths_from_padding,
    numbers,
    read_lengths,
    read_scores,
    read_tokens,
    strings,
)
from mtmd.files import safe_pickle
from mtmd.files.checks import shown


def load_mmsa(path: str | os.PathLike[str], *, name: str, score_range: tuple[float, float] | None = None) -> Dataset:
    """Read a pickle in MMSA's layout, aligned or unaligned, without running anything in it.

    Args:
        path: The pickle.
        name: What to call the dataset, say "mosi".
        score_range: See `from_mmsa`.

    Raises:
        DataError: If the layout is not MMSA's. See `from_mmsa`.
        safe_pickle.UnsafePickleError: If the file holds more than plain data, or is damaged.
        OSError: If the file cannot be read.
    """
    content = safe_pickle.load(path)
    with open(path, "rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return from_mmsa(content, name=name, source=os.fspath(path), fingerprint=fingerprint, score_range=score_range)


def from_mmsa(
    content: Mapping[str, Any],
    *,
    name: str,
    source: str,
    synthetic: bool = False,
    fingerprint: str | None = None,
    score_range: tuple[float, float] | None = None,
    classes: tuple[str, ...] = CLASSES,
) -> Dataset:
    """Check and take over content in MMSA's layout: `{"train" | "valid" | "test": {key: array}}`.

    | key                               | expected                                           |
    |-----------------------------------|----------------------------------------------------|
    | `id`                              | n strings                                          |
    | `regression_labels`               | (n,) or (n, 1) finite numbers                      |
    | `regression_labels_{T,A,V}`       | (n,) or (n, 1) numbers, as CH-SIMS has them        |
    | `audio`, `vision`                 | (n, T, d) numbers, padded with zeros at the end    |
    | `text_bert`, `text`, `raw_text`   | (n, 3, L), (n, L, d), n strings                    |
    | `{audio,vision,text}_lengths`     | n integers from 0 (missing) to T; may be left out  |

    Of audio, vision and the forms of the text, one is enough; all folds have the same. What a model needs of them is
    asked before it is trained (needs.py). Other keys are not read. Without lengths, as in aligned files, the zero steps
    at the end of a sample are padding, and a sample of zeros alone is missing; text features take the length of the
    attention mask where there is one. Features that are NaN or infinite stay as they are here; `Standardizer.apply`
    puts 0, the training mean, in their place.

    Args:
        content: The folds. Lists are read like arrays.
        name: What to call the dataset, say "mosi".
        source: Where it comes from, for error messages.
        synthetic: Whether it is made up.
        fingerprint: Identifies the data; computed from the arrays if not given.
        score_range: Between which the scores lie. None: [-1, 1] for CH-SIMS, which is known by "sims" in
            its name, or by labels for each modality where no score is outside [-1, 1]; [-3, 3] for anything else.
        classes: What to call scores below, at and above 0.

    Raises:
        DataError: At the first thing that is missing or of a wrong shape or kind.
    """
    folds, notes, score_range = _read(content, None, name, source, score_range)
    fingerprint = data_sha256(folds, labels=True) if fingerprint is None else fingerprint
    return Dataset(name, synthetic, folds, notes, fingerprint, score_range, classes)


def examine_mmsa(
    content: Mapping[str, Any],
    *,
    source: str,
    name: str = "",
    score_range: tuple[float, float] | None = None,
    expected: Sequence[str] = FOLDS,
) -> tuple[dict[str, Fold], list[str], list[str]]:
    """Look at all of it, or of the folds `expected`, where `from_mmsa` stops at the first error.

    Returns:
        The folds as far as they could be read, the errors, and the notes that `Dataset.notes` would hold.
    """
    errors: list[str] = []
    folds, notes, _ = _read(content, errors, name, source, score_range, expected)
    return folds, errors, notes


def read_fold(content: Mapping[str, Any], *, source: str) -> Fold:
    """Check and take over a fold to predict from, with the keys that `from_mmsa` describes: any may be missing.

    Labels are not read, scores are 0. A single sample may come as it is, without the axis of samples.

    Raises:
        DataError: At the first thing that is of a wrong shape or kind, or if nothing is there that could be read.
    """
    if not isinstance(content, Mapping):
        raise DataError(f"{source}: expected a dictionary of arrays, got {shown(content)}")
    forms = [key for key in KEYS if key in content]
    bare = {key: value for key, value in content.items() if key in AXES and axes(value) == AXES[key] - 1}
    if forms and set(forms) - {"raw_text"} <= set(bare):  # an array of one sample, or nothing but words
        in_fold = {key: value[None] if isinstance(value, np.ndarray) else [value] for key, value in bare.items()}
        content = {**content, **in_fold}
    if forms:
        content = {key: value for key, value in content.items() if not key.startswith("regression_labels")}
        samples = range(count_samples(content))
        content = {"id": list(map(str, samples)), **content, "regression_labels": [0.0] * len(samples)}
    fold = _read_fold(content, source, "", MOSI_RANGE, [], None)
    assert fold is not None  # or an error was raised
    return fold


def _read(
    content: Any,
    errors: list[str] | None,
    name: str,
    source: str,
    score_range: tuple[float, float] | None,
    expected: Sequence[str] = FOLDS,
) -> tuple[dict[str, Fold], list[str], tuple[float, float]]:
    """The folds, the notes, the range of scores. Errors go on the list `errors` where there is one."""
    there: dict[str, Mapping[str, Any]] = {}
    layout = f"{source}: expected a dictionary of the folds {', '.join(FOLDS)}"
    with _noting(errors):
        if not isinstance(content, Mapping):
            raise DataError(f"{layout}, got {shown(content)}")
    for fold in expected if isinstance(content, Mapping) else ():
        with _noting(errors):
            if fold not in content:
                raise DataError(f"{layout}; {fold!r} is missing, there is: {key_names(content)}")
            if not isinstance(content[fold], Mapping):
                raise DataError(f"{source}: {fold}: expected a dictionary of arrays, got {shown(content[fold])}")
            there[fold] = content[fold]
    if score_range is None:
        is_sims = "sims" in name.lower() or (there and all(map(_looks_like_sims, there.values())))
        score_range = SIMS_RANGE if is_sims else MOSI_RANGE
    notes: list[str] = []
    read = {
        fold: _read_fold(keys, f"{source}: {fold}", fold, score_range, notes, errors) for fold, keys in there.items()
    }
    folds = {name: fold for name, fold in read.items() if fold is not None}
    _check_folds_agree(there, folds, source, errors)
    return folds, notes + _repeated_ids(folds), score_range


def _looks_like_sims(fold: Mapping[str, Any]) -> bool:
    """Whether there are labels for each modality, and no score outside [-1, 1]."""
    if not set(UNIMODAL_LABELS.values()) <= set(fold):
        return False
    try:
        scores = read_scores(fold, "regression_labels", "", count_samples(fold))
    except DataError:  # told where the fold is read
        return False
    return not (np.abs(scores) > SIMS_RANGE[1]).any()


@contextmanager
def _noting(errors: list[str] | None) -> Iterator[None]:
    """Around a step of reading: puts an error on the list and goes on; without a list the error goes its way."""
    try:
        yield
    except DataError as error:
        if errors is None:
            raise
        errors.append(str(error))


def _read_fold(
    content: Mapping[str, Any],
    where: str,
    fold: str,
    score_range: tuple[float, float],
    notes: list[str],
    errors: list[str] | None,
) -> Fold | None:
    """`where` begins error messages, `fold` begins notes. None where there is nothing to go by."""
    n = count_samples(content)
    with _noting(errors):
        if not set(KEYS) & set(content):
            raise DataError(f"{where}: expected at least one of {', '.join(KEYS)}, there is: {key_names(content)}")
        if not n:
            raise DataError(f"{where}: expected at least one sample, got none")
    if not n:
        return None
    ids = raw_text = text_bert = None
    scores = np.full(n, np.nan, np.float32)
    with _noting(errors):
        scores = read_scores(content, "regression_labels", where, n)
        notes += _score_notes(f"{fold}/regression_labels", scores, score_range)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise DataError(
                f"{where}: regression_labels: expected finite numbers, got {scores[bad[0]]} in row {bad[0]}, "
                f"{len(bad)} NaN or infinite in all; leave these samples out"
            )
    with _noting(errors):
        ids = strings(content, "id", where, n)
    if "raw_text" in content:
        with _noting(errors):
            raw_text = strings(content, "raw_text", where, n)
    if "text_bert" in content:
        with _noting(errors):
            text_bert = read_tokens(content, where, n)
            missing = int((~text_bert[:, 1].any(axis=1)).sum())
            if missing:
                notes.append(f"{fold}/text_bert: missing (no token) in {missing} of {n} samples")

    features, lengths, unimodal = {}, {}, {}
    for modality in MODALITIES:
        if modality not in content:
            continue
        with _noting(errors):
            original = numbers(content, modality, where, n, ("T", "d"), f"({n}, T, d) numbers")
            with np.errstate(over="ignore"):  # what overflows is found and told by _feature_notes
                array = original.astype(np.float32, copy=False)
            key = f"{modality}_lengths"
            if key in content:
                length = read_lengths(content, key, where, n, longest=array.shape[1])
            elif modality == "text" and text_bert is not None and text_bert.shape[2] == array.shape[1]:
                length = text_bert[:, 1].sum(axis=1)
            else:
                length = lengths_from_padding(array)
                notes.append(f"{fold}/{modality}: no {key}; taken from the zero steps at the end")
            notes += _feature_notes(f"{fold}/{modality}", original, array, length)
            features[modality], lengths[modality] = array, length
    for modality, key in UNIMODAL_LABELS.items():
        if key in content:
            with _noting(errors):
                unimodal[modality] = read_scores(content, key, where, n)
                notes += _score_notes(f"{fold}/{key}", unimodal[modality], score_range)
    unread = tuple(key for key in content if key not in {*AXES, *NOT_READ})
    if unread:
        notes.append(f"{fold}: not read: {key_names(unread)}")
    if ids is None:  # an error is noted; these are in no other fold
        ids = [f"{where}: {row}" for row in range(n)]
    return Fold(ids, scores, raw_text, text_bert, features, lengths, unimodal, unread)


def _score_notes(where: str, scores: np.ndarray, score_range: tuple[float, float]) -> list[str]:
    notes = []
    low, high = score_range
    finite = scores[np.isfinite(scores)]
    outside = int(((finite < np.float32(low)) | (finite > np.float32(high))).sum())
    if outside:
        notes.append(
            f"{where}: {outside} outside [{low:g}, {high:g}], from {finite.min():g} to {finite.max():g}; "
            "left as they are"
        )
    if len(finite) < len(scores):
        notes.append(f"{where}: {len(scores) - len(finite)} NaN or infinite")
    if where == "train/regression_labels" and len(finite) and (finite.min() >= 0 or finite.max() <= 0):
        side = "below" if finite.min() >= 0 else "above"
        notes.append(
            f"{where}: none {side} 0, so that one of the three classes is empty; numbers of classes are no scores"
        )
    return notes


def _feature_notes(where: str, original: Any, array: np.ndarray, length: np.ndarray) -> list[str]:
    notes = []
    there = length > 0
    finite = np.isfinite(array) | ~there[:, None, None]
    if not finite.all():
        overflown = int((np.isfinite(np.asarray(original)) & ~finite).sum())
        kinds = {
            "-inf": int((array[there] == -np.inf).sum()),
            "inf": int((array[there] == np.inf).sum()),
            "nan": int(np.isnan(array[there]).sum()),
        }
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        samples = int((~finite).any(axis=(1, 2)).sum())
        notes.append(
            f"{where}: {counts} in {samples} samples"
            + (f" ({overflown} of them too large for float32)" if overflown else "")
            + "; 0, the training mean, takes their place when standardised"
        )
    used = (array != 0).any(axis=2)
    inside = np.arange(array.shape[1]) < length[:, None]
    missing = int((length == 0).sum())
    if missing:
        notes.append(f"{where}: missing (length 0) in {missing} of {len(length)} samples")
    hollow = int((there & ~(finite.any(axis=2) & inside).any(axis=1)).sum())
    if hollow:
        notes.append(f"{where}: nothing but NaN or infinite in {hollow} samples; missing? say so with length 0")
    behind = int((there & (used & ~inside).any(axis=1)).sum())
    if behind:
        notes.append(f"{where}: not zero behind the end in {behind} samples; cut off there when standardised")
    blank = int((there & ~(used & inside).any(axis=1)).sum())
    if blank:
        notes.append(f"{where}: nothing but zeros in {blank} samples of length > 0; not missing")
    late = int(((length > 1) & used.any(axis=1) & ~used[:, 0]).sum())
    if late:
        notes.append(f"{where}: {late} samples begin with zeros; is the padding in front?")
    return notes


def _check_folds_agree(
    content: Mapping[str, Mapping[str, Any]], folds: dict[str, Fold], source: str, errors: list[str] | None
) -> None:
    """All folds have the same keys and widths. What could not be read of one is no fault of the others."""
    for key in (*KEYS, *UNIMODAL_LABELS.values()):
        having = [name for name in content if key in content[name]]
        lacking = [name for name in content if key not in content[name]]
        with _noting(errors):
            if having and lacking:
                raise DataError(f"{source}: {key} is in {' and '.join(having)}, but not in {' and '.join(lacking)}")
    for modality in MODALITIES:
        widths = {name: fold.features[modality].shape[2] for name, fold in folds.items() if modality in fold.features}
        for name, width in widths.items():
            first = next(iter(widths))
            with _noting(errors):
                if width != widths[first]:
                    raise DataError(
                        f"{source}: {name}: {modality}: expected {widths[first]} features as in {first}, got {width}"
                    )


def _repeated_ids(folds: dict[str, Fold]) -> list[str]:
    notes = []
    for name, fold in folds.items():
        repeated = len(fold) - len(set(fold.ids))
        if repeated:
            notes.append(f"{name}/id: {repeated} samples share their id with another")
    for first, second in itertools.combinations(folds, 2):
        shared = sorted(set(folds[first].ids) & set(folds[second].ids))
        if shared:
            notes.append(f"{first} and {second} share {len(shared)} ids, the first is {shared[0]}")
    return notes
