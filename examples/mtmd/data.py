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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtmd import safe_pickle
from mtmd.files import is_plain, is_text, shown

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Fold",
    "Standardizer",
    "batches",
    "class_labels",
    "drop_modalities",
    "examine_mmsa",
    "from_mmsa",
    "key_names",
    "load_mmsa",
    "one_text",
    "presence",
    "read_fold",
    "tokenize",
]

FOLDS = ("train", "valid", "test")
MODALITIES = ("text", "audio", "vision")
CLASSES = ("negative", "neutral", "positive")
ABSENT = -1  # the label of a row or key that is not there
MOSI_RANGE = (-3.0, 3.0)  # of the scores of CMU-MOSI and CMU-MOSEI
SIMS_RANGE = (-1.0, 1.0)  # of the scores of CH-SIMS
FORMS = {"text": ("text", "text_bert", "raw_text"), "audio": ("audio",), "vision": ("vision",)}  # keys of a modality
KEYS = tuple(key for forms in FORMS.values() for key in forms)
UNIMODAL_LABELS = {"text": "regression_labels_T", "audio": "regression_labels_A", "vision": "regression_labels_V"}
AXES = {"id": 1, "regression_labels": 1, "raw_text": 1, "text_bert": 3} | dict.fromkeys(MODALITIES, 3)
AXES |= dict.fromkeys([*UNIMODAL_LABELS.values(), *(f"{name}_lengths" for name in MODALITIES)], 1)
NOT_READ = {"annotations", "classification_labels", *(f"classification_labels_{one}" for one in "TAV")}
CHUNK = 256  # samples that are held in float64 at a time


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


# Reading


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
    | `regression_labels_{T,A,V}`       | (n,) or (n, 1) numbers; CH-SIMS alone has them     |
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
            its name or by its labels for each modality, and [-3, 3] for anything else.
        classes: What to call scores below, at and above 0.

    Raises:
        DataError: At the first thing that is missing or of a wrong shape or kind.
    """
    folds, notes, score_range = _read(content, None, name, source, score_range)
    fingerprint = _fingerprint(folds) if fingerprint is None else fingerprint
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
    bare = {key: value for key, value in content.items() if key in AXES and _axes(value) == AXES[key] - 1}
    if forms and set(forms) - {"raw_text"} <= set(bare):  # an array of one sample, or nothing but words
        in_fold = {key: value[None] if isinstance(value, np.ndarray) else [value] for key, value in bare.items()}
        content = {**content, **in_fold}
    if forms:
        content = {key: value for key, value in content.items() if not key.startswith("regression_labels")}
        samples = range(_samples(content))
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
        unimodal = set(UNIMODAL_LABELS.values())
        is_sims = "sims" in name.lower() or (there and all(unimodal <= set(fold) for fold in there.values()))
        score_range = SIMS_RANGE if is_sims else MOSI_RANGE
    notes: list[str] = []
    read = {
        fold: _read_fold(keys, f"{source}: {fold}", fold, score_range, notes, errors) for fold, keys in there.items()
    }
    folds = {name: fold for name, fold in read.items() if fold is not None}
    _check_folds_agree(there, folds, source, errors)
    return folds, notes + _repeated_ids(folds), score_range


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
    n = _samples(content)
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
        scores = _read_scores(content, "regression_labels", where, n)
        notes += _score_notes(f"{fold}/regression_labels", scores, score_range)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise DataError(
                f"{where}: regression_labels: expected finite numbers, got {scores[bad[0]]} in row {bad[0]}, "
                f"{len(bad)} NaN or infinite in all; leave these samples out"
            )
    with _noting(errors):
        ids = _strings(content, "id", where, n)
    if "raw_text" in content:
        with _noting(errors):
            raw_text = _strings(content, "raw_text", where, n)
    if "text_bert" in content:
        with _noting(errors):
            text_bert = _read_tokens(content, where, n)
            missing = int((~text_bert[:, 1].any(axis=1)).sum())
            if missing:
                notes.append(f"{fold}/text_bert: missing (no token) in {missing} of {n} samples")

    features, lengths, unimodal = {}, {}, {}
    for modality in MODALITIES:
        if modality not in content:
            continue
        with _noting(errors):
            original = _numbers(content, modality, where, n, ("T", "d"), f"({n}, T, d) numbers")
            with np.errstate(over="ignore"):  # what overflows is found and told by _feature_notes
                array = original.astype(np.float32, copy=False)
            key = f"{modality}_lengths"
            if key in content:
                length = _read_lengths(content, key, where, n, longest=array.shape[1])
            elif modality == "text" and text_bert is not None and text_bert.shape[2] == array.shape[1]:
                length = text_bert[:, 1].sum(axis=1)
            else:
                length = _lengths_from_padding(array)
                notes.append(f"{fold}/{modality}: no {key}; taken from the zero steps at the end")
            notes += _feature_notes(f"{fold}/{modality}", original, array, length)
            features[modality], lengths[modality] = array, length
    for modality, key in UNIMODAL_LABELS.items():
        if key in content:
            with _noting(errors):
                unimodal[modality] = _read_scores(content, key, where, n)
                notes += _score_notes(f"{fold}/{key}", unimodal[modality], score_range)
    unread = [key for key in content if key not in {*AXES, *NOT_READ}]
    if unread:
        notes.append(f"{fold}: not read: {key_names(unread)}")
    if ids is None:  # an error is noted; these are in no other fold
        ids = [f"{where}: {row}" for row in range(n)]
    return Fold(ids, scores, raw_text, text_bert, features, lengths, unimodal)


def _axes(value: Any) -> int:
    """Of an array, or of nested lists as far as their first entries tell."""
    axes = 0
    while isinstance(value, list | tuple) and value:
        value, axes = value[0], axes + 1
    return axes + (value.ndim if isinstance(value, np.ndarray) else 0)


def _samples(content: Mapping[str, Any]) -> int:
    """How many samples a fold has: as many as most of its keys have entries."""
    values = [content[key] for key in AXES if key in content]
    arrays = [value for value in values if isinstance(value, list | tuple) or getattr(value, "ndim", 0)]
    counts = [len(array) for array in arrays]
    return max(counts, key=counts.count, default=0)


def _read_scores(content: Mapping[str, Any], key: str, where: str, n: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _numbers(content, key, where, n, (), f"{n} numbers").astype(np.float32)


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
    return notes


def _read_tokens(content: Mapping[str, Any], where: str, n: int) -> np.ndarray:
    parts = ("token ids", "attention mask", "segment ids")
    expected = f"({n}, 3, L) {parts[0]}, {parts[1]} and {parts[2]}"
    array = _numbers(content, "text_bert", where, n, (3, "L"), expected)
    # The files store them as float32, which is exact far beyond any vocabulary.
    odd = np.argwhere(~(np.isfinite(array) & (array >= 0) & (array < 2**24) & (array == np.floor(array))))
    if len(odd):
        row, part, _ = odd[0]
        got = f"{array[tuple(odd[0])]} among the {parts[part]} of row {row}"
        raise DataError(f"{where}: text_bert: expected {expected}, whole numbers from 0 on, got {got}")
    ids, mask, segments = tokens = array.astype(np.int64).transpose(1, 0, 2)
    order = f"{where}: text_bert: expected {', '.join(parts)}, in this order"
    if mask.max() > 1:
        row = int(mask.max(axis=1).argmax())
        raise DataError(f"{order}, with a mask of 0 and 1; got {mask.max()} in the mask of row {row}")
    used = ids.any(axis=1)
    if used.any() and not mask[used, 0].any() and (segments[used, 0] == 1).all():
        raise DataError(f"{order}; got a mask that begins with 0 and segments that begin with 1, as if exchanged")
    return np.ascontiguousarray(tokens.transpose(1, 0, 2))


def _read_lengths(content: Mapping[str, Any], key: str, where: str, n: int, longest: int) -> np.ndarray:
    expected = f"{n} integers from 0 to {longest}"
    array = _numbers(content, key, where, n, (), expected)
    bad = ~((array >= 0) & (array <= longest) & (array == np.floor(array)))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"{where}: {key}: expected {expected}, got {array[row]} in row {row}")
    return array.astype(np.int64)


def _lengths_from_padding(array: np.ndarray) -> np.ndarray:
    used = (array != 0).any(axis=2)  # (n, T); NaN is not 0
    last = array.shape[1] - used[:, ::-1].argmax(axis=1)
    return np.where(used.any(axis=1), last, 0).astype(np.int64)


def _feature_notes(where: str, original: Any, array: np.ndarray, length: np.ndarray) -> list[str]:
    notes = []
    finite = np.isfinite(array)
    if not finite.all():
        overflown = int((np.isfinite(np.asarray(original)) & ~finite).sum())
        kinds = {
            "-inf": int((array == -np.inf).sum()),
            "inf": int((array == np.inf).sum()),
            "nan": int(np.isnan(array).sum()),
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
    behind = int((used & ~inside).any(axis=1).sum())
    if behind:
        notes.append(f"{where}: not zero behind the end in {behind} samples; cut off there when standardised")
    blank = int(((length > 0) & ~(used & inside).any(axis=1)).sum())
    if blank:
        notes.append(f"{where}: nothing but zeros in {blank} samples of length > 0; not missing")
    late = int(((length > 1) & used.any(axis=1) & ~used[:, 0]).sum())
    if late:
        notes.append(f"{where}: {late} samples begin with zeros; is the padding in front?")
    return notes


def _numbers(
    content: Mapping[str, Any], key: str, where: str, n: int, row: tuple[int | str, ...], expected: str
) -> np.ndarray:
    """The array (n, *row) at a key; in `row` a letter stands for any size but 0. For () a column (n, 1) will do."""
    value = _value(content, key, where)
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    fault = _fault(value, n, row)
    if fault:
        lengths = f", and give {key}_lengths" if PAD in fault and key in MODALITIES else ""
        raise DataError(f"{where}: {key}: expected {expected}, got {fault}{lengths}")
    array = np.asarray(value)
    return array if row else array.reshape(n)


PAD = "; pad with zeros at the end to the longest"  # and give the lengths, adds who knows the key


def _fault(value: Any, n: int, row: tuple[int | str, ...]) -> str:
    """What stands there instead of (n, *row) numbers; empty where it is these."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iuf":
            return f"dtype {value.dtype}" + (f", {shown(value.flat[0])} in row 0" if value.ndim and value.size else "")
        got = str(len(value)) if value.ndim == 1 and not row else f"shape {value.shape}"
        return "" if value.shape[:1] == (n,) and _fits(value.shape[1:], row) else got
    if not isinstance(value, list | tuple):
        return shown(value)
    if len(value) != n:
        return f"{len(value)} rows" if row else str(len(value))
    shapes = []
    for place, one in enumerate(value):  # before numpy, which gives each text in a list the room of the longest
        odd = _no_number(one)
        if odd:
            return f"{odd} in row {place}" + (PAD if one is None and row else "")  # a sample that misses it
        shapes.append(_shape(one))
        if shapes[-1] is None:
            return f"lists of different lengths within row {place}"
        if not _fits(shapes[-1], row):
            got = f"shape {shapes[-1]}" if shapes[-1] else shown(one)
            return f"{got} in row {place}" + (PAD if 0 in shapes[-1] else "")
    for place, shape in enumerate(shapes):
        if shape != shapes[0]:
            if not row:
                return f"{shown(value[place])} in row {place}"
            same = [here == first for here, first in zip(shape, shapes[0], strict=True)]
            if same[-1] or row[-1] == "L":
                hint = PAD
            else:  # the width differs, or time stands where the width should
                hint = f"; transpose what is (d, T){PAD}" if same[0] else "; all need the same width d"
            return f"shape {shapes[0]} in row 0 and {shape} in row {place}{hint}"
    return ""


def _fits(shape: tuple[int, ...], row: tuple[int | str, ...]) -> bool:
    sizes = (1,) if shape == (1,) and not row else row
    return len(shape) == len(sizes) and all(
        size > 0 if isinstance(wanted, str) else size == wanted for size, wanted in zip(shape, sizes, strict=True)
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    """That of nested lists; None where these are ragged."""
    try:
        return np.shape(value)
    except (ValueError, TypeError, RecursionError):
        return None


def _no_number(value: Any) -> str:
    """The first thing in nested lists that is no number; empty where all are."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | tuple):
            waiting.extend(reversed(one))
        elif isinstance(one, np.ndarray):
            if one.dtype.kind not in "iuf":
                return f"dtype {one.dtype}"
        elif type(one) is int and abs(one) < 2**63:
            continue
        elif not isinstance(one, float | np.integer | np.floating):
            return shown(one)
    return ""


def _strings(content: Mapping[str, Any], key: str, where: str, n: int) -> list[str]:
    value = _value(content, key, where)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or len(value) != n:
        got = len(value) if isinstance(value, list | tuple) else shown(value)
        raise DataError(f"{where}: {key}: expected {n} strings, got {got}")
    fits = is_plain if key == "id" else is_text  # an id stands in tables and messages, a text holds what it likes
    for row, one in enumerate(value):
        number = key == "id" and isinstance(one, int | np.integer) and not isinstance(one, bool) and abs(one) < 2**63
        if number or fits(one):
            continue
        written = " that can be written" if isinstance(one, str) else ""
        raise DataError(
            f"{where}: {key}: expected {n} strings{written}, got {shown(one)} in row {row}{_hint(key, one)}"
        )
    return [str(one) for one in value]


def _hint(key: str, one: Any) -> str:
    """What to do with what stands in place of a text."""
    if isinstance(one, bytes):
        return "; decode it"
    if key == "id" and isinstance(one, list | tuple):
        return "; join its parts to one text, as VIDEO$_$CLIP"
    missing = one is None or (isinstance(one, float) and np.isnan(one))
    return "; a text that is missing is ''" if key == "raw_text" and missing else ""


def _value(content: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in content:
        raise DataError(f"{where}: the key {key!r} is missing, there is: {key_names(content)}")
    return content[key]


def key_names(content: Iterable[Any]) -> str:
    """The keys of a dictionary, for a message."""
    names = [str(key) if is_plain(key) and len(key) < 40 else shown(key) for key in content]
    return ", ".join(names[:30] + ["..."] * (len(names) > 30)) or "nothing"


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


def _fingerprint(folds: dict[str, Fold]) -> str:
    digest = hashlib.sha256()
    for name, fold in folds.items():
        arrays = {"scores": fold.scores, "text_bert": fold.text_bert, **fold.features}
        arrays |= {f"{key}_lengths": length for key, length in fold.lengths.items()}
        arrays |= {UNIMODAL_LABELS[key]: values for key, values in fold.unimodal_scores.items()}
        digest.update(repr((name, fold.ids, fold.raw_text)).encode(errors="backslashreplace"))
        for key, array in arrays.items():
            if array is not None:
                digest.update(repr((key, array.shape, array.dtype.str)).encode())
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# Standardising


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


# What models take


def class_labels(scores: np.ndarray) -> np.ndarray:
    """0 negative, 1 neutral, 2 positive: the sign of each score, as int64 of the same shape."""
    return np.sign(scores).astype(np.int64) + 1


def presence(fold: Fold) -> dict[str, np.ndarray]:
    """Which samples have which modality, (n,) bool; text is there as features or as tokens."""
    return _presence(fold.lengths, fold.text_bert)


def _presence(lengths: Mapping[str, np.ndarray], tokens: np.ndarray | None) -> dict[str, np.ndarray]:
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


def tokenize(
    raw_text: Sequence[str], tokenizer: Any, max_length: int, *, before: Sequence[str] | None = None
) -> np.ndarray:
    """Turn texts into what `Fold.text_bert` holds, with a tokenizer of transformers.

    Longer texts are cut to `max_length` tokens; L is the length of the longest. A text without any
    letter or sign has no tokens at all, not even the marks of begin and end: it counts as missing.

    Args:
        raw_text: The texts.
        tokenizer: Of transformers.
        max_length: Most tokens of a text, with its context.
        before: What stands before each text. As much of its end as there is room for goes first, and the text is
            segment 1 behind it.

    Returns:
        Token ids, attention mask and segment ids, shape `(n, 3, L)` int64. Without `before` segment ids
        are 0 for a tokenizer that has none.
    """
    encoded = tokenizer(
        list(raw_text),
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=max_length,
        return_attention_mask=True,
        return_tensors="np",
    )
    ids = encoded["input_ids"]
    segments = encoded.get("token_type_ids", np.zeros_like(ids))
    tokens = np.stack([ids, encoded["attention_mask"], segments], axis=1).astype(np.int64)
    if before is not None:
        tokens = _behind(tokens, before, tokenizer, max_length)
    tokens[[not text.strip() for text in raw_text]] = 0
    return tokens


def _behind(tokens: np.ndarray, before: Sequence[str], tokenizer: Any, max_length: int) -> np.ndarray:
    """The tokens of texts behind those of what stands before them: begin, before, end, text, end."""
    rows = []
    for own, context in zip(tokens, before, strict=True):
        ids = own[0, : int(own[1].sum())]
        room = max_length - len(ids)
        earlier = tokenizer(context, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        earlier = earlier[-(room - 1) :] if room > 1 else []
        first = [ids[0], *earlier, ids[-1]] if earlier else ids[:1]
        kinds = np.repeat([0, 1], [len(first), len(ids) - 1]) if earlier else np.zeros(len(ids), np.int64)
        rows.append(np.stack([np.concatenate([first, ids[1:]]), np.ones_like(kinds), kinds]))
    longest = max(row.shape[1] for row in rows)
    padding = np.array([tokenizer.pad_token_id or 0, 0, 0])[:, None]
    return np.stack([np.concatenate([row, padding.repeat(longest - row.shape[1], axis=1)], axis=1) for row in rows])


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
        present={name: torch.from_numpy(there) for name, there in _presence(lengths, tokens).items()},
        total=total,
    )
